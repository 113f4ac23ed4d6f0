package integration

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/lab"
	"github.com/shoalnet/shoal/peer"
)

// TestCertificateIsVisible: how it stands with a node's certificate is to be seen in
// info, doctor, events, node ls and metrics: that it ends soon, has ended, was made by
// another clock, and that the managers who renew it are not reached.
func TestCertificateIsVisible(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itcert", lab.Options{Nodes: 2, Managers: 1})
	root := s.root()
	kill := func(n string) {
		t.Helper()
		if err := s.KillAgent(n); err != nil {
			t.Fatal(err)
		}
	}
	start := func(n string) {
		t.Helper()
		if err := s.Start(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	says := func(status string, words ...string) {
		t.Helper()
		s.eventually(slow(20*time.Second), func() error {
			var d struct {
				Checks []struct{ Name, Status, Message, Hint string }
			}
			r := s.on("node2", "shoal", "doctor", "-o", "json")
			if err := json.Unmarshal([]byte(r.out), &d); err != nil {
				return fmt.Errorf("doctor: %w: %s%s", err, r.out, r.err)
			}
			var all []string
			left := words
			for _, c := range d.Checks {
				if c.Name == "certificate" {
					all = append(all, c.Status+" "+c.Message+" ("+c.Hint+")")
					if len(left) > 0 && c.Status == status && strings.Contains(c.Message+" ("+c.Hint+")", left[0]) {
						left = left[1:]
					}
				}
			}
			if len(left) > 0 {
				return fmt.Errorf("doctor says %q of the certificate, want %s: %q", all, status, left)
			}
			return nil
		})
	}
	metric := func() time.Time {
		t.Helper()
		out := s.ok("node2", "curl -s --unix-socket %s http://shoal/metrics", s.socketOf("node2"))
		for l := range strings.Lines(out) {
			var at float64
			if n, _ := fmt.Sscanf(l, "shoal_certificate_not_after_timestamp_seconds %g", &at); n == 1 {
				return time.Unix(int64(at), 0)
			}
		}
		t.Fatalf("no metric of the certificate in %s", out)
		return time.Time{}
	}
	certified := func() int {
		return strings.Count(s.ok("node1", "shoal events --since 1h --until 0s"), "node certify node2")
	}
	listed := func() string { return s.ok("node1", "shoal node ls -o wide -f name=node2 --format {{.Certificate}}") }
	says("ok", "worker, until")
	was := certified()

	// It ends soon, and the manager that would renew it is away.
	kill("node1")
	kill("node2")
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	s.recertify("node2", root, end.Add(-24*time.Hour), end)
	start("node2")
	says("warn", "ends soon, at "+end.UTC().Format(time.RFC3339), "can't be brought up to date")
	if got := s.ok("node2", "shoal info"); !strings.Contains(got, "until "+end.UTC().Format("2006-01-02 15:04")) {
		t.Errorf("info: %s", got)
	}
	if got := metric(); !got.Equal(end) {
		t.Errorf("the metric says %s, want %s", got, end)
	}

	// The manager is back: it is renewed by itself.
	start("node1")
	says("ok", "worker, until")
	s.eventually(slow(20*time.Second), func() error {
		if got := metric(); !got.After(end.Add(24 * time.Hour)) {
			return fmt.Errorf("the metric says %s", got)
		}
		if got := certified(); got <= was {
			return fmt.Errorf("%d events of node2's certificate, as before", got)
		}
		if got, want := listed(), "until "+metric().UTC().Format("2006-01-02"); got != want {
			return fmt.Errorf("node ls: %q, want %q", got, want)
		}
		return nil
	})

	// Another clock made it, or this one is behind.
	kill("node2")
	from := time.Now().Add(time.Hour)
	s.recertify("node2", root, from, from.Add(24*time.Hour))
	start("node2")
	says("error", "set the clock right")

	// It has ended: nobody takes it, and the way back is the one that doctor names.
	kill("node2")
	s.recertify("node2", root, time.Now().Add(-24*time.Hour), time.Now().Add(-time.Minute))
	start("node2")
	says("error", "shoal leave --force, then join again")
	s.eventually(slow(20*time.Second), func() error {
		if got := s.ok("node1", "shoal node ls -f name=node2 --format {{.Status}}"); got != "down" {
			return fmt.Errorf("node2 is %s", got)
		}
		return nil
	})
	s.ok("node2", "shoal leave --force")
	s.ok("node1", "shoal node rm --force node2")
	s.ok("node2", "shoal join --token %s --advertise-addr %s %s", s.ok("node1", "shoal token show -q worker"), s.addrOf("node2"), s.addrOf("node1"))
	says("ok", "worker, until")
}

// socketOf is a node's agent's.
func (s site) socketOf(node string) string {
	for _, n := range s.Nodes() {
		if n.Name == node {
			return n.Socket
		}
	}
	s.Fatalf("no node %s", node)
	return ""
}

// root is the cluster's authority, from a snapshot.
func (s site) root() *peer.Root {
	s.Helper()
	path := filepath.Join(s.TempDir(), "snapshot")
	s.ok("node1", "shoal snapshot save %s", path)
	b, err := os.ReadFile(path)
	if err != nil {
		s.Fatal(err)
	}
	_, st, err := control.ReadSnapshot(b)
	if err != nil {
		s.Fatal(err)
	}
	roots := st.Trust().Roots
	r := roots[len(roots)-1]
	root, err := peer.ParseRoot(r.Cert, r.Key, r.Cross)
	if err != nil {
		s.Fatal(err)
	}
	return root
}

// recertify gives a node, whose agent does not run, a certificate that differs from its
// own in when it was made and ends alone.
func (s site) recertify(node string, root *peer.Root, from, until time.Time) {
	s.Helper()
	path := peer.Path(s.dataDir(node))
	creds, err := peer.Load(path)
	if err != nil {
		s.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		s.Fatal(err)
	}
	block, rest := pem.Decode(b)
	for block != nil && block.Type != "CERTIFICATE" {
		block, rest = pem.Decode(rest)
	}
	if block == nil {
		s.Fatalf("%s has no certificate", path)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		s.Fatal(err)
	}
	// A day and an hour early, for machines whose clock is behind, as managers make them.
	leaf.NotBefore, leaf.NotAfter = from.Add(-25*time.Hour), until
	der, err := x509.CreateCertificate(rand.Reader, leaf, root.Cert, creds.Signer().Public(), root.Key)
	if err != nil {
		s.Fatal(err)
	}
	if err := creds.Set(append([][]byte{der}, root.Chain()...), [][]byte{root.Cert.Raw}); err != nil {
		s.Fatal(err)
	}
	if err := creds.Save(path); err != nil {
		s.Fatal(err)
	}
}
