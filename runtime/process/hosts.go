package process

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/runtime"
)

// SetHosts implements runtime.Runtime.
func (r *Runtime) SetHosts(ctx context.Context, id, name string, addrs []netip.Addr) error {
	if _, err := r.Status(ctx, id); err != nil {
		return err
	}
	file := filepath.Join(r.taskDir(id), "hosts")
	// The task has this very file mounted: it is changed, not replaced.
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	text := withHost(string(old), name, addrs)
	if text == string(old) {
		return nil
	}
	// Cut off last, so that no reader finds it empty.
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return f.Truncate(int64(len(text)))
}

// etcFiles are what a task has of its own in /etc, when it starts.
func etcFiles(t runtime.Task) map[string][]byte {
	return map[string][]byte{"resolv.conf": t.ResolvConf, "hosts": t.Hosts, "hostname": []byte(t.Hostname + "\n")}
}

// writeEtc writes one of them, for all to read, whatever the umask.
func writeEtc(path string, content []byte) error {
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Chmod(path, 0o644)
}

// mendFiles writes those of a task's files that are gone from its directory as they were
// when it started. What it has mounted are those that nobody can change any more: it gets
// these in their place, by mendMounts.
func (r *Runtime) mendFiles(t runtime.Task) error {
	content := etcFiles(t)
	var errs []error
	for _, name := range covered(t.Netns) {
		p := filepath.Join(r.taskDir(t.ID), name)
		st, err := os.Lstat(p)
		if err == nil && st.Mode().IsRegular() {
			continue
		}
		if err == nil {
			errs = append(errs, durable.PutAside(p))
		}
		errs = append(errs, writeEtc(p, content[name]))
	}
	return errors.Join(errs...)
}

// withHost is a hosts file (hosts(5)) in which name stands for addrs. Lines that
// are not of the form in which the agent writes them are somebody else's.
func withHost(text, name string, addrs []netip.Addr) string {
	var out strings.Builder
	var have []netip.Addr
	for l := range strings.Lines(text) {
		addr, rest, _ := strings.Cut(strings.TrimSuffix(l, "\n"), "\t")
		if a, err := netip.ParseAddr(addr); err == nil && rest == name && !a.IsLoopback() {
			if !slices.Contains(addrs, a) || slices.Contains(have, a) {
				continue
			}
			have = append(have, a)
		}
		out.WriteString(l)
	}
	if s := out.String(); s != "" && !strings.HasSuffix(s, "\n") {
		out.WriteByte('\n')
	}
	for _, a := range addrs {
		if !slices.Contains(have, a) {
			fmt.Fprintf(&out, "%s\t%s\n", a, name)
		}
	}
	return out.String()
}
