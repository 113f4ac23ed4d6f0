package agent

import (
	"cmp"
	"slices"
	"strings"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
)

// maxFaults and maxFaultBytes bound a report: a range of 16,384 ports may be held.
const (
	maxFaults     = 50
	maxFaultBytes = 300
)

// faultsOf tells the managers of the services and tasks that this node can't do
// all it should for, by the objects of vip and ingress that failed.
func faultsOf(a *assignment, failed []reconcile.ObjectStatus) []*shoalv1.ReportRequest_Fault {
	if a == nil {
		return nil
	}
	var out []*shoalv1.ReportRequest_Fault
	for _, o := range failed {
		id := a.owner(o.Object)
		if id == "" {
			continue
		}
		if len(out) == maxFaults {
			break
		}
		out = append(out, &shoalv1.ReportRequest_Fault{Object: id, Message: strings.ToValidUTF8(o.Err[:min(len(o.Err), maxFaultBytes)], "")})
	}
	return out
}

// owner finds whose a reconciler's object is, like "service web: port 8080/tcp",
// "task web.1: …" or "network app: vip 10.0.1.2": the ID of a service or of a task
// that is no service's, "" for what is neither's.
func (a *assignment) owner(object string) string {
	whose, what, _ := strings.Cut(object, ": ")
	kind, name, _ := strings.Cut(whose, " ")
	switch kind {
	case "service":
		if i := slices.IndexFunc(a.Services, func(s spec.Service) bool { return s.Spec.Name == name }); i >= 0 {
			return a.Services[i].ID
		}
	case "task":
		if i := slices.IndexFunc(a.Tasks, func(t spec.Task) bool { return t.Name == name }); i >= 0 {
			return cmp.Or(a.Tasks[i].Service, a.Tasks[i].ID)
		}
	case "network":
		addr, ok := strings.CutPrefix(what, "vip ")
		i := slices.IndexFunc(a.Networks, func(n spec.Network) bool { return n.Name == name })
		if !ok || i < 0 {
			return ""
		}
		for _, s := range a.Services {
			for _, v := range s.VIPsOn(a.Networks[i].ID) {
				if v.String() == addr {
					return s.ID
				}
			}
		}
	}
	return ""
}
