package integration

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/imagefile"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/lab"
)

// Where a lab's registries are: one content, by three doors.
const (
	plain = outsideAddr + ":5000" // HTTP, open to all
	bad   = outsideAddr + ":5001" // the same, with a fault for each repository of badRegistry
	safe  = outsideAddr + ":5443" // TLS, by a CA that nodes are told of, for user ana with password geheim
	other = "172.30.0.253:5443"   // the same, of whose CA they are not told
	dead  = outsideAddr + ":5999" // nobody is there
)

// htpasswd is "geheim" by bcrypt, the only kind that the registry takes.
const htpasswd = "ana:$2b$05$9TYGlhtAMgZyPAx82TnKaOehdaAMGtG5IgVYPlWHsCbRRPwCV1WSS\n"

// registry is Debian's docker-registry outside of a lab's nodes.
type registry struct {
	site
	http *http.Client
}

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociConfig   = "application/vnd.oci.image.config.v1+json"
	ociLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// withRegistry makes a lab whose nodes may use its registries.
func withRegistry(t *testing.T, name string, o lab.Options) *registry {
	t.Helper()
	needContainers(t, "docker-registry")
	dir := t.TempDir()
	key, cert := filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	selfSigned(t, key, cert)
	certs := filepath.Join(dir, "certs.d", safe)
	if err := os.MkdirAll(certs, 0o755); err != nil {
		t.Fatal(err)
	}
	pemCert, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	named := filepath.Join(dir, "certs.d", "registry.example.com") // the plain one, by a name
	if err := os.MkdirAll(named, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{filepath.Join(certs, "ca.crt"): string(pemCert), filepath.Join(dir, "htpasswd"): htpasswd,
		filepath.Join(named, "hosts.toml"): fmt.Sprintf("server = %q\n", "http://"+plain)} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	o.Containers = true
	o.AgentArgs = append(o.AgentArgs, "--registry-config", filepath.Join(dir, "certs.d"), "--insecure-registry", plain, "--insecure-registry", bad, "--insecure-registry", dead)
	s := own(t, name, o)
	ns := "shoal-" + s.Name + "-underlay"
	r := &registry{s, &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return nl.Dial(ctx, ns, "tcp", netip.MustParseAddrPort(addr))
	}}}}
	if _, err := s.client("ip", "addr", "add", strings.TrimSuffix(other, ":5443")+"/24", "dev", "br0"); err != nil {
		t.Fatal(err)
	}
	for addr, more := range map[string]string{plain: "", safe: fmt.Sprintf("  tls: {certificate: %q, key: %q}\nauth: {htpasswd: {realm: test, path: %q}}\n", cert, key, filepath.Join(dir, "htpasswd"))} {
		_, port, _ := net.SplitHostPort(addr)
		conf := filepath.Join(dir, port+".yml")
		text := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp:\n  addr: %s\n%s", filepath.Join(dir, "content"), ":"+port, more)
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		cmd := exec.Command("ip", "netns", "exec", ns, "docker-registry", "serve", conf)
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if t.Failed() && log.Len() > 0 {
				t.Logf("registry %s: %s", addr, log.Bytes()[:min(log.Len(), 2000)])
			}
		})
	}
	for _, addr := range []string{plain, safe} {
		s.eventually(20*time.Second, func() error {
			c, err := nl.Dial(t.Context(), ns, "tcp", netip.MustParseAddrPort(addr))
			if err != nil {
				return err
			}
			return c.Close()
		})
	}
	r.badRegistry(ns)
	return r
}

// selfSigned writes a key and its certificate for outsideAddr.
func selfSigned(t *testing.T, key, cert string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.ParseIP(outsideAddr)}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: kder}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// badRegistry passes everything on to the plain one, but for what the repository's
// name says.
func (r *registry) badRegistry(ns string) {
	r.Helper()
	var ln net.Listener
	if err := nl.Do(ns, func() (err error) {
		ln, err = net.Listen("tcp", bad)
		return err
	}); err != nil {
		r.Fatal(err)
	}
	end := make(chan struct{}) // of what hangs
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: plain})
	proxy.Transport, proxy.FlushInterval = r.http.Transport, -1
	proxy.ModifyResponse = func(resp *http.Response) error {
		blob, path := strings.Contains(resp.Request.URL.Path, "/blobs/"), resp.Request.URL.Path
		if resp.StatusCode/100 != 2 || resp.Request.Method != http.MethodGet {
			return nil
		}
		switch repo := strings.Split(path, "/")[2]; {
		case repo == "flipped" && blob && resp.ContentLength > 4096, repo == "forged" && strings.Contains(path, "/manifests/"):
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			resp.Body = io.NopCloser(bytes.NewReader(b))
		case repo == "stuck" && blob && resp.ContentLength > 4096:
			resp.Body = io.NopCloser(io.MultiReader(io.LimitReader(resp.Body, 2048), hang(end)))
		}
		return nil
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch repo := strings.Split(req.URL.Path+"//", "/")[2]; repo {
		case "silent":
			_, _ = hang(end).Read(nil)
		case "broken":
			http.Error(w, "no", http.StatusBadGateway)
		default:
			proxy.ServeHTTP(w, req)
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	r.Cleanup(func() {
		close(end)
		srv.Close()
		<-done
	})
}

// hang is a reader that has nothing to say until it is closed.
type hang chan struct{}

func (h hang) Read([]byte) (int, error) {
	<-h
	return 0, io.EOF
}

// put sends something to the registry.
func (r *registry) put(method, url, kind string, body []byte) *http.Response {
	r.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		r.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	resp, err := r.http.Do(req)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		b, _ := io.ReadAll(resp.Body)
		r.Fatalf("%s %s: %s: %s", method, url, resp.Status, b)
	}
	return resp
}

func (r *registry) blob(repo string, b []byte) {
	r.Helper()
	where, err := r.put(http.MethodPost, "http://"+plain+"/v2/"+repo+"/blobs/uploads/", "", nil).Location()
	if err != nil {
		r.Fatal(err)
	}
	q := where.Query()
	q.Set("digest", "sha256:"+imagefile.Sum(b))
	where.RawQuery = q.Encode()
	r.put(http.MethodPut, where.String(), "application/octet-stream", b)
}

// push puts an image into the registry and returns its digest.
func (r *registry) push(i anImage, repo, tag string) string {
	r.Helper()
	var z bytes.Buffer
	w, _ := gzip.NewWriterLevel(&z, gzip.BestSpeed)
	_, _ = w.Write(i.Layer)
	_ = w.Close()
	return r.pushLayer(i.Config, z.Bytes(), repo, tag)
}

func (r *registry) pushLayer(config, layer []byte, repo, tag string) string {
	r.Helper()
	part := func(kind string, b []byte) map[string]any {
		r.blob(repo, b)
		return map[string]any{"mediaType": kind, "digest": "sha256:" + imagefile.Sum(b), "size": len(b)}
	}
	m := marshal(r.T, map[string]any{"schemaVersion": 2, "mediaType": ociManifest, "config": part(ociConfig, config), "layers": []any{part(ociLayer, layer)}})
	r.put(http.MethodPut, "http://"+plain+"/v2/"+repo+"/manifests/"+tag, ociManifest, m)
	return "sha256:" + imagefile.Sum(m)
}

// index puts a list of images, by platform, into the registry.
func (r *registry) index(repo, tag string, of map[string]anImage) {
	r.Helper()
	var list []any
	for arch, i := range of {
		digest := r.push(i, repo, arch)
		req, err := http.NewRequest(http.MethodGet, "http://"+plain+"/v2/"+repo+"/manifests/"+digest, nil)
		if err != nil {
			r.Fatal(err)
		}
		req.Header.Set("Accept", ociManifest)
		resp, err := r.http.Do(req)
		if err != nil {
			r.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			r.Fatal(err)
		}
		list = append(list, map[string]any{"mediaType": ociManifest, "digest": digest, "size": len(b), "platform": map[string]string{"architecture": arch, "os": "linux"}})
	}
	r.put(http.MethodPut, "http://"+plain+"/v2/"+repo+"/manifests/"+tag, ociIndex, marshal(r.T, map[string]any{"schemaVersion": 2, "mediaType": ociIndex, "manifests": list}))
}

// web is a small HTTP server that says its version.
func web(t *testing.T, arch, version string) anImage {
	t.Helper()
	busybox := needContainers(t)
	page := filepath.Join(t.TempDir(), "page")
	if err := os.WriteFile(page, []byte("version "+version+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return build(t, arch, map[string]string{"bin/busybox": busybox, "bin/sh": busybox, "tmp/index.html": page},
		map[string]any{"Entrypoint": []string{"/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/tmp"}, "StopSignal": "SIGKILL"})
}

// notes are those of failed tasks, by the beginning of their names: NODE: NOTE.
func (s site) notes(prefix string) (all []string) {
	s.Helper()
	var ts []task
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal ps -a -o json")), &ts); err != nil {
		s.Fatal(err)
	}
	for _, t := range ts {
		if strings.HasPrefix(t.Name, prefix) && t.Status.State == "failed" {
			all = append(all, t.NodeName+": "+t.Status.Message)
		}
	}
	return all
}

// versions are what the replicas of a service say that they are, by replica.
func (s site) versions(service string, n int) map[string]int {
	s.Helper()
	out := map[string]int{}
	for i := 1; i <= n; i++ {
		out[s.ok("node1", "shoal exec %s.%d /bin/busybox cat /tmp/index.html", service, i)]++
	}
	return out
}

// TestRegistries: images from registries of each kind, by their digest, and with the
// user's login.
func TestRegistries(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	r := withRegistry(t, "reg", lab.Options{Nodes: 2, Managers: 1, AgentArgs: []string{"--registry-mirror", "http://" + dead, "--registry-mirror", "http://" + plain}})
	one, two := web(t, "amd64", "one"), web(t, "amd64", "two")
	r.push(one, "web", "1")
	r.push(one, "library/mirrored", "latest")
	r.index("many", "1", map[string]anImage{"amd64": one, "s390x": web(t, "s390x", "other")})
	r.ok("node1", "shoal net create app")

	// One image, though the tag moves.
	r.ok("node1", "shoal svc create --name web --network app --update-monitor 0s %s/web:1", plain)
	moved := r.push(two, "web", "1")
	r.ok("node1", "shoal svc scale web=2")
	if got := r.versions("web", 2); got["version one"] != 2 {
		t.Errorf("after the tag moved, the replicas are %v, want one image", got)
	}
	r.ok("node1", "shoal svc update --image %s/web:1 web", plain)
	if got := r.versions("web", 2); got["version two"] != 2 {
		t.Errorf("after svc update --image the replicas are %v", got)
	}
	if got := r.ok("node1", "shoal svc inspect -o json web"); !strings.Contains(got, plain+"/web:1@"+moved) {
		t.Errorf("the service's image is not pinned to %s: %s", moved, got)
	}

	// --pull, of a single task: what the node has, what the registry has.
	page := "--rm --network app --entrypoint /bin/busybox %s/web:1 cat /tmp/index.html"
	r.ok("node1", "shoal image pull %s/web:1", plain)
	r.push(one, "web", "1")
	for _, c := range []struct{ pull, want string }{{"never", "version two"}, {"missing", "version two"}, {"always", "version one"}, {"never", "version one"}} {
		if got := r.ok("node1", "shoal run --pull %s "+page, c.pull, plain); got != c.want {
			t.Errorf("--pull %s: %q, want %q", c.pull, got, c.want)
		}
	}

	// Of an index this node's platform; Docker Hub's by a mirror, past one that is dead.
	r.ok("node1", "shoal run --rm --network app --entrypoint /bin/busybox %s/many:1 true", plain)
	r.ok("node1", "shoal run --rm --network app --entrypoint /bin/busybox mirrored true")

	// A login: of this user's, kept by login, sent to other nodes when that is asked for.
	home := t.TempDir()
	user := func(in, line string, args ...any) result {
		r.Helper()
		return r.in(in, "node1", append([]string{"env", "DOCKER_CONFIG=" + home}, words(fmt.Sprintf(line, args...))...)...)
	}
	want := func(res result, code int, text string) {
		t.Helper()
		if res.code != code || !strings.Contains(res.out+res.err, text) {
			t.Errorf("exit status %d, %q, %q; want %d with %q", res.code, res.out, res.err, code, text)
		}
	}
	advice := "run 'shoal login " + safe + "'"
	want(user("", "shoal image pull %s/web:1", safe), 1, advice)
	want(user("", "shoal run --rm --network app %s/web:1", safe), 125, advice)
	want(user("", "shoal svc create -d --name locked --network app --replicas 2 %s/web:1", safe), 0, advice)
	r.eventually(20*time.Second, func() error {
		notes := r.notes("locked.")
		if !slices.ContainsFunc(notes, func(n string) bool { return strings.Contains(n, advice) }) {
			return fmt.Errorf("notes of a service without a login: %q", notes)
		}
		return nil
	})
	want(user("falsch", "shoal login -u ana --password-stdin %s", safe), 0, "Login kept")
	want(user("", "shoal image pull %s/web:1", safe), 1, advice)
	want(user("geheim", "shoal login -u ana --password-stdin %s", safe), 0, "Login kept")
	want(user("", "shoal image pull %s/web:1", safe), 0, safe+"/web:1@sha256:")
	r.ok("node1", "shoal svc rm locked")
	want(user("", "shoal svc create --name locked --network app --mode global --update-monitor 0s --with-registry-auth %s/web:1", safe), 0, "")
	if got := r.running("locked"); len(got) != 2 {
		t.Errorf("with the login sent along %d nodes run it", len(got))
	}
	// It stays with the service, for nodes that come later and updates without the flag, and nobody sees it.
	r.push(two, "web", "2")
	want(user("", "shoal svc update --image %s/web:2 locked", safe), 0, "")
	for _, l := range []string{"svc inspect -o json locked", "ps -a -o json", "svc ps -o json locked"} {
		if got := r.ok("node1", "shoal %s", l); strings.Contains(strings.ToLower(got), "registry_auth") || strings.Contains(got, "geheim") {
			t.Errorf("%s shows the login: %s", l, got)
		}
	}
	want(user("", "shoal logout %s", safe), 0, "Removed the login of "+safe)
	want(user("", "shoal logout %s", safe), 0, "Not logged in")
	want(user("", "shoal run --pull always --rm --network app %s/web:1", safe), 125, advice)

	want(user("", "shoal image pull %s/web:1", other), 1, "--registry-config, as "+other+"/ca.crt")
}

// TestBadRegistries: whatever is wrong with an image, its tasks say where, which and
// what to do; svc create says it while it waits; others go on.
func TestBadRegistries(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	r := withRegistry(t, "regbad", lab.Options{Nodes: 2, Managers: 1, AgentArgs: []string{"--pull-timeout", "1s"}})
	// No two of one content: containerd fetches what it has for none a second time.
	for _, repo := range []string{"good", "flipped", "forged", "stuck", "silent", "broken"} {
		r.push(web(t, "amd64", repo), repo, "1")
	}
	none := web(t, "amd64", "none")
	r.push(web(t, "s390x", "other"), "foreign", "1")
	r.index("foreign", "2", map[string]anImage{"s390x": web(t, "s390x", "other")})
	r.pushLayer(none.Config, []byte("no gzip, and no tar"), "damaged", "1")
	var conf map[string]any
	if err := json.Unmarshal(none.Config, &conf); err != nil {
		t.Fatal(err)
	}
	conf["config"] = map[string]any{"Entrypoint": []string{"/nope"}}
	r.push(anImage{imagefile.Image{Layer: none.Layer, Config: marshal(t, conf)}}, "nope", "1")
	r.ok("node1", "shoal net create app")
	r.ok("node1", "shoal svc create --name good --network app --replicas 2 %s/good:1", plain)
	r.ok("node1", "shoal run -d --name client --network app -- sleep 10000")

	cases := []struct{ name, image, want, todo string }{
		{"unknown", plain + "/nosuch:1", "is not in registry " + plain, "check its name and tag"},
		{"untagged", plain + "/good:9", "is not in registry " + plain, "check its name and tag"},
		{"foreign", plain + "/foreign:1", "it is for linux/s390x, and this node's platform is linux/amd64", ""},
		{"foreign2", plain + "/foreign:2", "has no variant for this node's platform linux/amd64", ""},
		{"damaged", plain + "/damaged:1", "has a damaged layer", "build and push it anew"},
		{"flipped", bad + "/flipped:1", "sent something else than the image's digest says", "push it anew"},
		{"forged", bad + "/forged:1", "sent something else than the image's digest says", "push it anew"},
		{"nope", plain + "/nope:1", "no such file or directory", "check the command"},
		{"stuck", bad + "/stuck:1", "does not answer in time", "the registry stopped sending for 1s"},
		{"silent", bad + "/silent:1", "does not answer in time", ""},
		{"broken", bad + "/broken:1", "registry " + bad + " fails", "502 Bad Gateway"},
		{"dead", dead + "/good:1", "can't be reached", "the way to it"},
		{"nologin", safe + "/good:1", "without a valid login", "shoal login"},
	}
	for _, c := range cases {
		r.ok("node1", "shoal svc create -d --name %s --network app --restart-delay 1h %s", c.name, c.image)
	}
	for _, c := range cases {
		r.eventually(60*time.Second, func() error {
			notes := r.notes(c.name + ".")
			for _, n := range notes {
				node, note, _ := strings.Cut(n, ": ")
				if strings.HasPrefix(note, "node "+node+": image "+c.image) && strings.Contains(note, c.want) && strings.Contains(note, c.todo) {
					return nil
				}
			}
			return fmt.Errorf("notes of %s: %q, want one with %q and %q", c.name, notes, c.want, c.todo)
		})
	}
	if l := r.inTask("client", "-n 100 http://good/"); l.Failed > 0 {
		t.Errorf("beside services that can't start, %d of %d requests to another fail: %v", l.Failed, l.Requests, l.Errors)
	}

	// Who waits is told: how far it is, and why it does not come.
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "shoal"), "lab", "exec", "--name", r.Name, "node1", "--", "shoal", "svc", "create", "--name", "waited", "--network", "app", bad+"/stuck:1")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // its child, too
	told, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []string
	far := false
	for lines := bufio.NewScanner(told); lines.Scan(); {
		said = append(said, lines.Text())
		far = far || strings.Contains(lines.Text(), "pulling "+bad+"/stuck:1: 2 kB of ")
		if far && strings.Contains(lines.Text(), "stopped sending for 1s") {
			_ = cmd.Cancel()
			_ = cmd.Wait()
			return
		}
	}
	_ = cmd.Wait()
	t.Errorf("svc create of what never comes says:\n%s", strings.Join(said, "\n"))
}
