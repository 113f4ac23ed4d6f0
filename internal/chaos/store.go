package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/shoalnet/shoal/internal/sleep"
)

// until tries again until it is done, or the time is up.
func until(ctx context.Context, limit time.Duration, try func() error) error {
	for end := time.Now().Add(limit); ; {
		err := try()
		if err == nil || time.Now().After(end) || !sleep.For(ctx, 300*time.Millisecond) {
			return err
		}
	}
}

// raftOf is what a manager says of its raft; an error where none runs.
func (w *world) raftOf(ctx context.Context, node string) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, scaled(askTime))
	defer cancel()
	socket := w.labNode(node).Socket
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shoal/metrics", nil)
	if err != nil {
		return nil, err
	}
	r, err := tr.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", node, err)
	}
	defer r.Body.Close()
	out := map[string]float64{}
	for sc := bufio.NewScanner(r.Body); sc.Scan(); {
		name, value, _ := strings.Cut(sc.Text(), " ")
		if name, ok := strings.CutPrefix(name, "shoal_raft_"); ok {
			if out[name], err = strconv.ParseFloat(value, 64); err != nil {
				return nil, fmt.Errorf("metrics of %s: %q: %w", node, sc.Text(), err)
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s says nothing of raft: it does not work as a manager", node)
	}
	return out, nil
}

// counts tells whether all managers that lost their store vote again: then what was
// acknowledged is with as many as before, and the next one may lose its. One at a time
// is what is promised to be borne, of three.
func (w *world) counts(ctx context.Context) error {
	for _, n := range sorted(w.storeless) {
		switch x := w.model.nodes[n]; {
		case x.open:
			return fmt.Errorf("%s lost its store, and whether it is a manager is open", n)
		case x.role == "manager":
			// First its own word, that it has a store again: until it asks to be admitted the
			// leader takes it for the voter that it was.
			if _, err := w.raftOf(ctx, n); err != nil {
				return err
			}
			pctx, cancel := context.WithTimeout(ctx, scaled(commandTime))
			_, err := w.lab.Run(pctx, n, w.lab.Binary, "node", "promote", n) // it is one: this waits for its vote
			cancel()
			if err != nil {
				return err
			}
		}
		delete(w.storeless, n)
	}
	return nil
}

// mayLose are nodes that no fault concerns, of whose managers none has lost its store.
func (w *world) mayLose(ctx context.Context) ([]string, error) {
	ns := w.well()
	if err := w.counts(ctx); err != nil || slices.ContainsFunc(sorted(w.model.nodes), func(n string) bool { return w.model.nodes[n].open }) {
		ns = slices.DeleteFunc(ns, func(n string) bool { return w.model.nodes[n].role == "manager" || w.model.nodes[n].open })
	}
	if len(ns) < 2 {
		return nil, errNobody
	}
	return ns, nil
}

// lost notes that what a node held as a manager is gone.
func (w *world) lost(n string) {
	if w.model.nodes[n].role == "manager" {
		w.storeless[n] = true
	}
}

func (w *world) data(n string) string {
	_, dir, _ := w.node(n)
	return filepath.Join(dir, "data")
}

// how says what of a node ends.
func how(whole bool) string {
	if whole {
		return "power"
	}
	return "agent"
}

// lostStore loses what a manager knows as one, while its agent is down.
func (w *world) lostStore(ctx context.Context) (*fault, error) {
	ns, err := w.mayLose(ctx)
	if err != nil {
		return nil, err
	}
	ns = slices.DeleteFunc(ns, func(n string) bool { return w.model.nodes[n].role != "manager" })
	if len(ns) == 0 {
		return nil, errNobody
	}
	n, whole := pick(w, ns), w.rng.IntN(2) == 0
	raft := filepath.Join(w.data(n), "raft")
	log := filepath.Join(raft, "log.db")
	loss := pick(w, []struct {
		what string
		do   func() error
	}{
		{"raft/ is gone", func() error { return os.RemoveAll(raft) }},
		{"log.db is gone", func() error { return os.Remove(log) }},
		{"log.db is empty", func() error { return os.Truncate(log, 0) }},
		{"log.db is cut", func() error {
			fi, err := os.Stat(log)
			if err != nil {
				return err
			}
			return os.Truncate(log, fi.Size()/4)
		}},
		{"raft/ is gone, and voter.json is noise", func() error {
			return errors.Join(os.RemoveAll(raft), os.WriteFile(filepath.Join(w.data(n), "voter.json"), []byte("\x00\xff~"), 0o600))
		}},
	})
	w.say("  fault: %s loses its %s; %s", n, how(whole), loss.what)
	f, err := w.fell(ctx, n, whole)
	if err != nil {
		return nil, err
	}
	w.lost(n)
	if err := loss.do(); err != nil {
		w.say("  %s: %v", n, err)
	}
	return f, nil
}
