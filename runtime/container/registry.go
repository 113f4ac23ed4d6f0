package container

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
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
	// is asked something, and in the middle of a layer. 0: a minute.
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

// resolver asks registries.
func (e *Executor) resolver(ctx context.Context, auth string) (remotes.Resolver, error) {
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
	client := func(c *http.Client) error {
		t, ok := c.Transport.(*http.Transport)
		if !ok {
			return nil
		}
		t.ResponseHeaderTimeout, t.TLSHandshakeTimeout = e.cfg.Pull.Stall, min(e.cfg.Pull.Stall, 30*time.Second)
		return nil
	}
	opts := config.HostOptions{Credentials: creds, UpdateClient: client}
	if d := e.cfg.Pull.HostsDir; d != "" {
		opts.HostDir = config.HostDirFromRoot(d)
	}
	base := config.ConfigureHosts(ctx, opts)
	plain := opts
	plain.DefaultScheme = "http"
	insecure := config.ConfigureHosts(ctx, plain)
	hosts := func(host string) ([]docker.RegistryHost, error) {
		pick := base
		if e.cfg.Pull.insecure(host) {
			pick = insecure
		}
		out, err := pick(host)
		if err != nil || host != "docker.io" {
			return out, err
		}
		var front []docker.RegistryHost
		for _, m := range e.cfg.Pull.Mirrors {
			u, err := url.Parse(m)
			if err != nil {
				return nil, err
			}
			h := out[len(out)-1]
			h.Host, h.Scheme = u.Host, u.Scheme
			h.Path = strings.TrimSuffix(filepath.Join("/", u.Path), "/") + "/v2"
			h.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve
			front = append(front, h)
		}
		return append(front, out...), nil
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: hosts}), nil
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
