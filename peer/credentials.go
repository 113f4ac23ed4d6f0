package peer

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

// Credentials are what a node shows and trusts: its key, its certificate and the
// cluster's roots. They change while connections use them.
type Credentials struct {
	key    crypto.Signer
	saving sync.Mutex // one writer of the file at a time

	mu    sync.Mutex
	chain [][]byte          // own certificate first; empty: none yet
	leaf  *x509.Certificate // of chain
	roots []*x509.Certificate
	since time.Time // when the certificate was set, with the monotonic clock
	renew float64   // when to renew, as a part of its life; see RenewAt
	// How often something was set, and how often it had been when it was last read or
	// saved.
	sets, saved uint64
}

// NewCredentials makes a key for a node that is about to get a certificate.
func NewCredentials() (*Credentials, error) {
	key, err := NewKey()
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return &Credentials{key: key}, nil
}

// Path is where a node's credentials are.
func Path(dataDir string) string { return filepath.Join(dataDir, "node.pem") }

// PEM block types of the file.
const (
	pemKey  = "PRIVATE KEY"
	pemCert = "CERTIFICATE"
	pemRoot = "SHOAL ROOT"
)

// Load reads credentials. One file has all of them, so that a crash can't part
// a key from its certificate.
func Load(path string) (*Credentials, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the node's certificate: %w", err)
	}
	c := &Credentials{}
	var chain, roots [][]byte
	for {
		var p *pem.Block
		if p, b = pem.Decode(b); p == nil {
			break
		}
		switch p.Type {
		case pemKey:
			if c.key, err = parseKey(p.Bytes); err != nil {
				return nil, damaged(path, err)
			}
		case pemCert:
			chain = append(chain, p.Bytes)
		case pemRoot:
			roots = append(roots, p.Bytes)
		}
	}
	if c.key == nil {
		return nil, damaged(path, errors.New("there is no key in it"))
	}
	if err := c.Set(chain, roots); err != nil {
		return nil, damaged(path, err)
	}
	c.saved = c.sets
	return c, nil
}

func damaged(path string, err error) error {
	return fmt.Errorf("%s is damaged: %w: restore it from a copy, or run 'shoal leave --force' and join again", path, err)
}

// Save writes the credentials, and a second copy ([durable.WriteTwice]), so that a
// crash leaves the old or the new ones.
func (c *Credentials) Save(path string) error {
	c.saving.Lock()
	defer c.saving.Unlock()
	der, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return fmt.Errorf("node's key: %w", err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})
	c.mu.Lock()
	sets := c.sets
	for _, b := range c.chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: b})...)
	}
	for _, r := range c.roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemRoot, Bytes: r.Raw})...)
	}
	c.mu.Unlock()
	if err := durable.WriteTwice(path, out); err != nil {
		return fmt.Errorf("the node's certificate: %w", err)
	}
	c.mu.Lock()
	c.saved = max(c.saved, sets)
	c.mu.Unlock()
	return nil
}

// Unsaved tells whether something was set that no Save has kept yet.
func (c *Credentials) Unsaved() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sets != c.saved
}

// Set takes a certificate for the node's key (first, then what else to show with
// it) and the roots to trust.
func (c *Credentials) Set(chain, roots [][]byte) error {
	if len(chain) == 0 || len(roots) == 0 {
		return errors.New("no certificate, or no root")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	if !samePublic(leaf.PublicKey, c.key.Public()) {
		return errors.New("the certificate is not for this node's key")
	}
	if _, err := subject(leaf); err != nil {
		return err
	}
	var rs []*x509.Certificate
	for _, b := range roots {
		r, err := x509.ParseCertificate(b)
		if err != nil {
			return fmt.Errorf("root certificate: %w", err)
		}
		rs = append(rs, r)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaf == nil || !c.leaf.Equal(leaf) {
		c.since, c.renew = time.Now(), RenewAt(rand.Float64())
	}
	c.chain, c.leaf, c.roots = slices.Clone(chain), leaf, rs
	c.sets++
	return nil
}

// SetRoots takes other roots to trust, if they are others.
func (c *Credentials) SetRoots(roots [][]byte) error {
	c.mu.Lock()
	chain, have := c.chain, c.roots
	c.mu.Unlock()
	if slices.EqualFunc(have, roots, func(r *x509.Certificate, b []byte) bool { return slices.Equal(r.Raw, b) }) {
		return nil
	}
	return c.Set(chain, roots)
}

// RenewAt is the part of a certificate's life after which it is renewed, for a
// random x from 0 to 1: between 0.5 and 0.8, so that nodes which joined together
// don't come back together.
func RenewAt(x float64) float64 { return 0.5 + 0.3*x }

// Due tells whether the certificate is to be renewed. The wall clock may jump, so
// the time since it was set counts as well, by the monotonic clock: a clock that
// was put back does not keep it from being renewed.
func (c *Credentials) Due() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaf == nil {
		return false
	}
	from := c.leaf.NotBefore.Add(backdate)
	life := c.leaf.NotAfter.Sub(from)
	after := time.Duration(float64(life) * c.renew)
	return time.Now().Round(0).After(from.Add(after)) || time.Since(c.since) > after
}

// Ready tells whether there is a certificate.
func (c *Credentials) Ready() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaf != nil
}

// Signer is the node's private key; see [Sign].
func (c *Credentials) Signer() crypto.Signer { return c.key }

// PublicKey is the node's, as assignments carry it.
func (c *Credentials) PublicKey() []byte {
	b, err := MarshalPublic(c.key.Public())
	if err != nil {
		return nil // it was made, or read, as one
	}
	return b
}

// Info is what people want to know of a certificate.
type Info struct {
	Subject
	From, Until time.Time // as it says: From is a day early, see backdate
	// Root is the digest of the root that signed it; Roots of all that the node
	// trusts.
	Root  string
	Roots []string
}

// Info describes the certificate; false when there is none yet.
func (c *Credentials) Info() (Info, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaf == nil {
		return Info{}, false
	}
	s, err := subject(c.leaf)
	if err != nil {
		return Info{}, false // Set takes none such
	}
	out := Info{Subject: s, From: c.leaf.NotBefore.Add(backdate), Until: c.leaf.NotAfter}
	for _, r := range c.roots {
		d := Digest(r.Raw)
		out.Roots = append(out.Roots, d)
		if c.leaf.CheckSignatureFrom(r) == nil {
			out.Root = d
		}
	}
	return out, true
}

// subject reads whom a certificate is for.
func subject(leaf *x509.Certificate) (Subject, error) {
	n := leaf.Subject
	if n.CommonName == "" || len(n.OrganizationalUnit) != 1 || len(n.Organization) != 1 || leaf.IsCA || !leaf.SerialNumber.IsUint64() {
		return Subject{}, fmt.Errorf("certificate of %q is not one of a node", n)
	}
	s := Subject{ID: n.CommonName, Role: n.OrganizationalUnit[0], Cluster: n.Organization[0], Serial: leaf.SerialNumber.Uint64()}
	if s.Role != spec.RoleManager && s.Role != spec.RoleWorker {
		return Subject{}, fmt.Errorf("certificate of node %s: role %q is unknown", s.ID, s.Role)
	}
	return s, nil
}

var errNoCertificate = errors.New("this node has no certificate yet")

func (c *Credentials) certificate() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaf == nil {
		return nil, errNoCertificate
	}
	return &tls.Certificate{Certificate: c.chain, PrivateKey: c.key, Leaf: c.leaf}, nil
}

// verify checks what the other end shows against the roots.
func (c *Credentials) verify(certs []*x509.Certificate) (Caller, error) {
	c.mu.Lock()
	roots, leaf := c.roots, c.leaf
	c.mu.Unlock()
	if leaf == nil {
		return Caller{}, errNoCertificate
	}
	own, err := subject(leaf)
	if err != nil {
		return Caller{}, err
	}
	s, err := verifyChain(certs, roots)
	if err != nil {
		return Caller{}, err
	}
	if s.Cluster != own.Cluster {
		return Caller{}, fmt.Errorf("node %s is of cluster %s, this is cluster %s", s.ID, s.Cluster, own.Cluster)
	}
	return Caller{Kind: kindOf(s.Role), ID: s.ID, Cluster: s.Cluster, Serial: s.Serial, certRole: s.Role}, nil
}

func verifyChain(certs, roots []*x509.Certificate) (Subject, error) {
	if len(certs) == 0 {
		return Subject{}, errors.New("no certificate is shown")
	}
	opt := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, r := range roots {
		opt.Roots.AddCert(r)
	}
	for _, i := range certs[1:] {
		opt.Intermediates.AddCert(i)
	}
	s, err := subject(certs[0])
	if err != nil {
		return s, err
	}
	if _, err := certs[0].Verify(opt); err != nil {
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			return s, fmt.Errorf("certificate of node %s holds from %s to %s, and the clock here says %s: set the clock right, or let the node leave and join again",
				s.ID, certs[0].NotBefore.UTC().Format(time.RFC3339), certs[0].NotAfter.UTC().Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339))
		}
		var unknown x509.UnknownAuthorityError
		if errors.As(err, &unknown) {
			return s, fmt.Errorf("certificate of node %s is of another cluster, or of a root that is trusted no more", s.ID)
		}
		return s, fmt.Errorf("certificate of node %s: %w", s.ID, err)
	}
	return s, nil
}
