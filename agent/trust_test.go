package agent

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

func TestCertificateFindings(t *testing.T) {
	from := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	info := peer.Info{Subject: peer.Subject{ID: "n", Role: spec.RoleWorker}, From: from, Until: from.Add(90 * 24 * time.Hour)}
	for name, k := range map[string]struct {
		at     time.Duration
		role   string
		failed error
		want   []string
	}{
		"new":               {at: time.Minute},
		"to be renewed":     {at: 80 * 24 * time.Hour},
		"ends soon":         {at: 82 * 24 * time.Hour, want: []string{"warn: the certificate ends soon, at 2030-04-01T00:00:00Z"}},
		"ended":             {at: 91 * 24 * time.Hour, want: []string{"error: the certificate ended at 2030-04-01"}},
		"clock behind":      {at: -time.Hour, want: []string{"error: the clock here says 2029-12-31T23:00:00Z"}},
		"CA is not reached": {at: time.Hour, failed: errors.New("no manager"), want: []string{"warn: the certificate or the role can't be brought up to date: no manager"}},
		"another role":      {at: time.Hour, role: spec.RoleManager, want: []string{"warn: the certificate is a worker's, and this node is a manager"}},
	} {
		role := k.role
		if role == "" {
			role = info.Role
		}
		got := certificateFindings(info, role, k.failed, from.Add(k.at))
		if len(got) != len(k.want) {
			t.Errorf("%s: %v, want %v", name, got, k.want)
			continue
		}
		for i, f := range got {
			if !strings.HasPrefix(f.status+": "+f.message, k.want[i]) || f.hint == "" {
				t.Errorf("%s: %+v, want %s", name, f, k.want[i])
			}
		}
	}
}

// TestLoadCredentials: what a node is to show is told from what another's, an old
// version's, or nobody's is; nothing is changed.
func TestLoadCredentials(t *testing.T) {
	root, err := peer.NewRoot("c1", nil)
	if err != nil {
		t.Fatal(err)
	}
	id := func() *identity {
		v := &identity{NodeID: "n1", CA: root.Digest()}
		v.Cluster.ID = "c1"
		return v
	}
	creds, err := peer.NewCredentials()
	if err != nil {
		t.Fatal(err)
	}
	if err := certify(creds, root, id(), 1); err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]struct {
		change func(*identity)
		file   func(path string) error
		want   string
	}{
		"its own":         {file: creds.Save},
		"of before":       {change: func(i *identity) { i.CA = "" }, want: "made before nodes had certificates"},
		"gone":            {want: "is gone"},
		"another node's":  {change: func(i *identity) { i.NodeID = "n2" }, file: creds.Save, want: "is of node n1 in cluster c1, and this is node n2"},
		"of another life": {change: func(i *identity) { i.Cluster.ID = "c2" }, file: creds.Save, want: "in cluster c2"},
		"empty":           {file: func(p string) error { return os.WriteFile(p, nil, 0o600) }, want: "is damaged"},
		"garbage":         {file: func(p string) error { return os.WriteFile(p, []byte("-----BEGIN"), 0o600) }, want: "is damaged"},
		"a directory":     {file: func(p string) error { return os.Mkdir(p, 0o700) }, want: "read the node's certificate"},
	} {
		dir := t.TempDir()
		v := id()
		if k.change != nil {
			k.change(v)
		}
		if k.file != nil {
			if err := k.file(filepath.Join(dir, "node.pem")); err != nil {
				t.Fatal(err)
			}
		}
		_, err := loadCredentials(dir, v, slog.New(slog.DiscardHandler))
		if k.want == "" && err != nil || k.want != "" && (err == nil || !strings.Contains(err.Error(), k.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %v, want %q", name, err, k.want)
		}
	}
	// The second copy is as good as the first, and each mends the other.
	other, err := peer.NewCredentials()
	if err != nil {
		t.Fatal(err)
	}
	stranger := id()
	stranger.NodeID = "n9"
	if err := certify(other, root, stranger, 1); err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func(string) error{
		"absent": os.Remove, "empty": func(p string) error { return os.Truncate(p, 0) }, "cut": func(p string) error { return os.Truncate(p, 100) },
		"another node's": func(p string) error {
			dir := t.TempDir()
			if err := other.Save(peer.Path(dir)); err != nil {
				return err
			}
			return os.Rename(peer.Path(dir), p)
		},
	} {
		for _, which := range []func(string) string{peer.Path, func(d string) string { return durable.CopyOf(peer.Path(d)) }} {
			dir := t.TempDir()
			if err := creds.Save(peer.Path(dir)); err != nil {
				t.Fatal(err)
			}
			if err := damage(which(dir)); err != nil {
				t.Fatal(err)
			}
			c, err := loadCredentials(dir, id(), slog.New(slog.DiscardHandler))
			if err != nil || string(c.PublicKey()) != string(creds.PublicKey()) || !sameFiles(peer.Path(dir), durable.CopyOf(peer.Path(dir))) {
				t.Errorf("%s: %s: %v", name, which(dir), err)
			}
		}
	}
}
