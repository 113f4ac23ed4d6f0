package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/spec"
)

// Health answers an outer load balancer that asks whether this node takes
// connections of a port that is published with mode local:
//
//	GET /health/PORT[/PROTOCOL]
//
// with 200 when a replica here is ready, 503 when none is, 404 when no such
// port is published. The answer is the data path's own: both are made of the
// same View.
const healthPattern = "GET /health/{port}/{protocol}"

func (a *Agent) health(w http.ResponseWriter, r *http.Request) {
	protocol := r.PathValue("protocol")
	if protocol == "" {
		protocol = spec.TCP
	}
	port, err := strconv.ParseUint(r.PathValue("port"), 10, 16)
	if err != nil || port == 0 {
		http.Error(w, fmt.Sprintf("port %q: want a number from 1 to 65535", r.PathValue("port")), http.StatusBadRequest)
		return
	}
	n, ok := 0, false
	if m := a.current(); m != nil {
		if v := m.view.Load(); v != nil {
			n, ok = ingress.Health(v, uint16(port), protocol)
		}
	}
	if !ok {
		http.Error(w, fmt.Sprintf("port %d/%s is not published with mode %s", port, protocol, spec.PortLocal), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if n == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(struct {
		Port          uint16 `json:"port"`
		Protocol      string `json:"protocol"`
		LocalReplicas int    `json:"local_replicas"`
	}{uint16(port), protocol, n})
}
