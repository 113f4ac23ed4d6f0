package container

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/distribution/reference"
)

// RegistryConfig says how images are fetched.
type RegistryConfig struct {
	HostsDir string   // of containerd's hosts.toml files, a directory for each registry; empty: none
	Insecure []string // HOST[:PORT] or a prefix of addresses: by HTTP, or HTTPS whose certificate nobody checks
	Mirrors  []string // URLs asked before Docker Hub, for its images
	// Stall is how long a registry may send nothing before it is given up: when it
	// is asked something, and in the middle of a layer, whatever comes of others.
	// 0: a minute.
	Stall time.Duration
	// Tries of one pull, where another may help. 0: 3.
	Tries int
}

func (c *RegistryConfig) defaults() {
	if c.Stall == 0 {
		c.Stall = time.Minute
	}
	if c.Tries == 0 {
		c.Tries = 3
	}
}

// Validate reports the first thing that is wrong with what a user may set.
func (c RegistryConfig) Validate() error {
	for _, i := range c.Insecure {
		if i == "" || strings.Contains(i, "://") {
			return fmt.Errorf("--insecure-registry %q: want HOST[:PORT], or a prefix like 10.0.0.0/8", i)
		}
	}
	for _, m := range c.Mirrors {
		if u, err := url.Parse(m); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return fmt.Errorf("--registry-mirror %q: want a URL like https://mirror.example.com", m)
		}
	}
	if c.Stall < 0 {
		return fmt.Errorf("--pull-timeout %s is negative", c.Stall)
	}
	return nil
}

// insecure tells whether a registry is one of cfg.Insecure, or of this machine.
func (c RegistryConfig) insecure(host string) bool {
	if docker.IsLocalhost(host) {
		return true
	}
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	ip := net.ParseIP(name)
	return slices.ContainsFunc(c.Insecure, func(i string) bool {
		if i == host || i == name {
			return true
		}
		_, n, err := net.ParseCIDR(i)
		return err == nil && ip != nil && n.Contains(ip)
	})
}

// Auth is what docker's X-Registry-Auth holds.
type Auth struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identitytoken,omitempty"`
	ServerAddress string `json:"serveraddress,omitempty"`
}

// EncodeAuth is the form in which it is handed on.
func EncodeAuth(a Auth) string {
	b, _ := json.Marshal(a)
	return base64.URLEncoding.EncodeToString(b)
}

func decodeAuth(s string) (a Auth, err error) {
	if s == "" {
		return a, nil
	}
	b, err := base64.URLEncoding.DecodeString(s)
	if err == nil {
		err = json.Unmarshal(b, &a)
	}
	if err != nil {
		return Auth{}, errors.New("the registry's user and password can't be read: log in again with 'shoal login'")
	}
	return a, nil
}

// resolver asks registries; got counts what they send.
func (e *Executor) resolver(ctx context.Context, auth string, got *transfer) (remotes.Resolver, error) {
	a, err := decodeAuth(auth)
	if err != nil {
		return nil, err
	}
	creds := func(host string) (string, string, error) {
		if a.ServerAddress != "" && registryHost(a.ServerAddress) != registryHost(host) {
			return "", "", nil
		}
		if a.IdentityToken != "" {
			return "", a.IdentityToken, nil
		}
		return a.Username, a.Password, nil
	}
	stall := e.cfg.Pull.Stall
	configure := func(insecure bool) docker.RegistryHosts {
		opts := config.HostOptions{Credentials: creds, UpdateClient: func(c *http.Client) error {
			t, ok := c.Transport.(*http.Transport)
			if !ok {
				return nil // it has been here before
			}
			t.ResponseHeaderTimeout, t.TLSHandshakeTimeout = stall, min(stall, 30*time.Second)
			dial := t.DialContext
			t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, stall)
				defer cancel()
				return dial(ctx, network, addr)
			}
			c.Transport = watched{t, stall, got}
			if insecure {
				t.TLSClientConfig.InsecureSkipVerify = true
				c.Transport = docker.NewHTTPFallback(c.Transport)
			}
			return nil
		}}
		if d := e.cfg.Pull.HostsDir; d != "" {
			opts.HostDir = config.HostDirFromRoot(d)
		}
		return config.ConfigureHosts(ctx, opts)
	}
	checked, unchecked := configure(false), configure(true)
	of := func(host string) docker.RegistryHosts {
		if e.cfg.Pull.insecure(host) {
			return unchecked
		}
		return checked
	}
	hosts := func(host string) ([]docker.RegistryHost, error) {
		out, err := of(host)(host)
		if err != nil || host != "docker.io" {
			return out, err
		}
		var front []docker.RegistryHost
		for _, m := range e.cfg.Pull.Mirrors {
			u, err := url.Parse(m)
			if err != nil {
				return nil, err
			}
			own, err := of(u.Host)(u.Host) // with its own certificates
			if err != nil {
				return nil, err
			}
			if len(own) == 0 {
				continue
			}
			h := own[len(own)-1]
			h.Host, h.Scheme = u.Host, u.Scheme
			h.Path = strings.TrimSuffix(filepath.Join("/", u.Path), "/") + "/v2"
			h.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve
			front = append(front, h)
		}
		return append(front, out...), nil
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: hosts}), nil
}

// transfer is how much registries have sent for a pull, of how much, in bytes, and how
// many answers are yet to end.
type transfer struct{ have, total, open atomic.Int64 }

// errStalled ends a pull from a registry that sends nothing.
var errStalled = errors.New("the registry stopped sending")

// watched gives up an answer that stops in the middle, and counts.
type watched struct {
	http.RoundTripper
	stall time.Duration
	got   *transfer
}

func (w watched) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.Context())
	resp, err := w.RoundTripper.RoundTrip(r.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, err
	}
	if r.Method == http.MethodGet && resp.StatusCode/100 == 2 {
		w.got.total.Add(max(resp.ContentLength, 0))
	}
	w.got.open.Add(1)
	resp.Body = &watchedBody{ReadCloser: resp.Body, watched: w, cancel: sync.OnceFunc(func() {
		cancel()
		w.got.open.Add(-1)
	})}
	return resp, nil
}

type watchedBody struct {
	io.ReadCloser
	watched
	cancel func()
}

func (b *watchedBody) Read(p []byte) (int, error) {
	var stalled atomic.Bool
	t := time.AfterFunc(b.stall, func() {
		stalled.Store(true)
		b.cancel()
	})
	n, err := b.ReadCloser.Read(p)
	t.Stop()
	b.got.have.Add(int64(n))
	if err != nil && stalled.Load() {
		err = fmt.Errorf("%w for %s", errStalled, b.stall)
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.cancel()
	return b.ReadCloser.Close()
}

// registryHost makes the names of one registry equal.
func registryHost(s string) string {
	if _, rest, ok := strings.Cut(s, "://"); ok {
		s = rest
	}
	s, _, _ = strings.Cut(s, "/")
	switch s {
	case "index.docker.io", "registry-1.docker.io", "docker.io":
		return "docker.io"
	}
	return s
}

// Normalize is an image's whole name: nginx is docker.io/library/nginx:latest. A
// tag beside a digest is kept apart: with both, the digest counts.
func Normalize(image string) (string, error) {
	r, err := reference.ParseDockerRef(image)
	if err != nil {
		return "", fmt.Errorf("image %q is no valid reference: %w", image, err)
	}
	return r.String(), nil
}

// Familiar is the name that people know: docker.io/library/nginx:latest is
// nginx:latest.
func Familiar(image string) string {
	r, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return image
	}
	return reference.FamiliarString(r)
}

// shown is an image's name for a note: with its tag, or else its digest, which
// nobody reads beside a tag.
func shown(image string) string {
	r, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return image
	}
	if t, ok := r.(reference.Tagged); ok {
		if named, err := reference.WithTag(reference.TrimNamed(r), t.Tag()); err == nil {
			r = named
		}
	}
	return reference.FamiliarString(reference.TagNameOnly(r))
}
