package peer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/shoalnet/shoal/spec"
)

const (
	// CertificateLife is for how long a node's certificate holds; it is renewed
	// long before (see [RenewAt]).
	CertificateLife = 90 * 24 * time.Hour
	// rootLife is a root's. The key is what 'shoal ca rotate' replaces.
	rootLife = 20 * 365 * 24 * time.Hour
	// backdate lets a certificate hold on a machine whose clock is a day behind,
	// with an hour to spare.
	backdate = 25 * time.Hour
)

// Root is a certificate authority of a cluster.
type Root struct {
	Cert *x509.Certificate
	// Key is nil where only the certificate is known.
	Key crypto.Signer
	// Cross is the same key certified by the root before, nil without one: who
	// trusts only that one can still follow.
	Cross *x509.Certificate
}

// NewKey makes a key: P-256, which outer load balancers and every TLS library
// understand, and which is as quick as Ed25519 here.
func NewKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// NewRoot makes an authority for a cluster; old, which may be nil, certifies it.
func NewRoot(cluster string, old *Root) (*Root, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	// Roots of one cluster have names of their own: chains are built by name.
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "Shoal root " + serial.Text(36), Organization: []string{cluster}},
		NotBefore:    now.Add(-backdate), NotAfter: now.Add(rootLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make a root certificate: %w", err)
	}
	r := &Root{Key: key}
	if r.Cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if old != nil {
		if der, err = x509.CreateCertificate(rand.Reader, t, old.Cert, key.Public(), old.Key); err != nil {
			return nil, fmt.Errorf("certify the new root by the old one: %w", err)
		}
		if r.Cross, err = x509.ParseCertificate(der); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// ParseRoot reads a root as it is stored: certificates in DER, the key in PKCS #8,
// where key and cross may be empty.
func ParseRoot(cert, key, cross []byte) (*Root, error) {
	r := &Root{}
	var err error
	if r.Cert, err = x509.ParseCertificate(cert); err != nil {
		return nil, fmt.Errorf("root certificate: %w", err)
	}
	if len(cross) > 0 {
		if r.Cross, err = x509.ParseCertificate(cross); err != nil {
			return nil, fmt.Errorf("root certificate: %w", err)
		}
	}
	if len(key) > 0 {
		if r.Key, err = parseKey(key); err != nil {
			return nil, fmt.Errorf("root key: %w", err)
		}
	}
	return r, nil
}

func parseKey(der []byte) (crypto.Signer, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T can't sign", k)
	}
	return s, nil
}

// MarshalKey is the key in PKCS #8.
func (r *Root) MarshalKey() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(r.Key) }

// Digest is what a join token says of a root.
func (r *Root) Digest() string { return Digest(r.Cert.Raw) }

// Chain is what a node sends after its own certificate: the cross-signed root
// for those who know only the one before, and the root for those who know only
// its digest.
func (r *Root) Chain() [][]byte {
	var out [][]byte
	if r.Cross != nil {
		out = append(out, r.Cross.Raw)
	}
	return append(out, r.Cert.Raw)
}

// Subject is whom a certificate is for.
type Subject struct {
	ID, Role, Cluster string
	// Serial is the raft index that it is signed at; 1 for the first node's.
	Serial uint64
}

// Sign certifies a node's public key.
func (r *Root) Sign(pub crypto.PublicKey, s Subject) ([]byte, error) {
	now := time.Now()
	return r.signFor(pub, s, now.Add(-backdate), now.Add(CertificateLife))
}

func (r *Root) signFor(pub crypto.PublicKey, s Subject, from, to time.Time) ([]byte, error) {
	if r.Key == nil {
		return nil, errors.New("the key of the cluster's root is not here")
	}
	if s.Role != spec.RoleManager && s.Role != spec.RoleWorker {
		return nil, fmt.Errorf("certificate for node %s: role %q: want manager or worker", s.ID, s.Role)
	}
	if s.ID == "" || s.Cluster == "" || s.Serial == 0 {
		return nil, fmt.Errorf("certificate: node ID %q, cluster %q and serial number %d must be set", s.ID, s.Cluster, s.Serial)
	}
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetUint64(s.Serial),
		Subject:      pkix.Name{CommonName: s.ID, OrganizationalUnit: []string{s.Role}, Organization: []string{s.Cluster}},
		NotBefore:    from, NotAfter: to,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, r.Cert, pub, r.Key)
	if err != nil {
		return nil, fmt.Errorf("certificate for node %s: %w", s.ID, err)
	}
	return der, nil
}

// Request is a node's request for a certificate (PKCS #10): it proves that the
// node has the key. Who it is for the managers decide.
func Request(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// CheckRequest returns the public key of a request.
func CheckRequest(der []byte) (crypto.PublicKey, error) {
	if len(der) > maxCert {
		return nil, fmt.Errorf("request for a certificate: %d bytes, more than %d", len(der), maxCert)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("request for a certificate: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("request for a certificate: %w", err)
	}
	if k, ok := r.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		return nil, fmt.Errorf("request for a certificate: the key is a %T, want one on the curve P-256", r.PublicKey)
	}
	return r.PublicKey, nil
}

// maxCert bounds a certificate or a request, in bytes; ours have some 500.
const maxCert = 16 << 10

// MarshalPublic is a public key as assignments carry it (PKIX, DER).
func MarshalPublic(pub crypto.PublicKey) ([]byte, error) { return x509.MarshalPKIXPublicKey(pub) }

// context of what is signed, so that a signature made for one purpose is of no
// use for another.
func toSign(purpose string, msg []byte) []byte {
	h := sha256.New()
	fmt.Fprintf(h, "shoal-1 %d %s\n", len(purpose), purpose)
	h.Write(msg)
	return h.Sum(nil)
}

// Sign signs a message for a purpose with a node's key.
func Sign(key crypto.Signer, purpose string, msg []byte) ([]byte, error) {
	return key.Sign(rand.Reader, toSign(purpose, msg), crypto.SHA256)
}

// PublicKey is a node's, parsed once for many checks.
type PublicKey struct{ key *ecdsa.PublicKey }

// ParsePublic reads a public key from an assignment.
func ParsePublic(der []byte) (PublicKey, error) {
	if len(der) > maxCert {
		return PublicKey{}, fmt.Errorf("public key: %d bytes, more than %d", len(der), maxCert)
	}
	k, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return PublicKey{}, fmt.Errorf("public key: %w", err)
	}
	e, ok := k.(*ecdsa.PublicKey)
	if !ok || e.Curve != elliptic.P256() {
		return PublicKey{}, fmt.Errorf("public key: a %T, want one on the curve P-256", k)
	}
	return PublicKey{e}, nil
}

// Verify tells whether sig is of this key, over the message, for the purpose.
func (k PublicKey) Verify(purpose string, msg, sig []byte) bool {
	return k.key != nil && ecdsa.VerifyASN1(k.key, toSign(purpose, msg), sig)
}

// ---- tokens ----

// text is base 32 without padding, in small letters: it survives being read
// aloud, and a double click.
var text = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

const tokenPrefix = "SHOAL-1-"

// Digest is a root's in a token.
func Digest(cert []byte) string {
	d := sha256.Sum256(cert)
	return text.EncodeToString(d[:])
}

// secretLen is a secret's, in bytes.
const secretLen = 20

// decodes tells whether s is so many bytes, and written in the one way that
// EncodeToString does: the decoder takes a letter too many.
func decodes(s string, n int) bool {
	b, err := text.DecodeString(s)
	return err == nil && len(b) == n && text.EncodeToString(b) == s
}

// NewSecret makes a token's secret, of 160 bits.
func NewSecret() string {
	b := make([]byte, secretLen)
	_, _ = rand.Read(b) // never fails
	return text.EncodeToString(b)
}

// Token is a join token: the digest by which a joining node knows the managers,
// and the secret by which they know that it may join, and as what.
type Token struct{ Digest, Secret string }

// String is the token as users type it.
func (t Token) String() string { return tokenPrefix + t.Digest + "-" + t.Secret }

// ParseToken reads a token.
func ParseToken(s string) (Token, error) {
	s = strings.TrimSpace(s)
	switch {
	case s == "":
		return Token{}, errors.New("no join token is given: 'shoal token show worker' (or manager) on a manager prints the command to type here")
	case strings.HasPrefix(s, "SWMTKN-"):
		return Token{}, errors.New("the join token is one of Docker Swarm: a Shoal token begins with " + tokenPrefix + ", see 'shoal token show' on a manager")
	}
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	d, secret, ok2 := strings.Cut(rest, "-")
	bad := func(why string) (Token, error) {
		return Token{}, fmt.Errorf("the join token is not one (%s): want %sDIGEST-SECRET, whole, as 'shoal token show' prints it on a manager", why, tokenPrefix)
	}
	if !ok || !ok2 {
		return bad("it does not have that form")
	}
	if !decodes(d, sha256.Size) {
		return bad("its digest is cut or changed")
	}
	if !decodes(secret, secretLen) {
		return bad("its secret is cut or changed")
	}
	return Token{d, secret}, nil
}

// HashSecret is what of a secret is kept and compared.
func HashSecret(secret string) []byte {
	h := sha256.Sum256([]byte("shoal token " + secret))
	return h[:]
}

// samePublic compares public keys.
func samePublic(a, b crypto.PublicKey) bool {
	x, err1 := MarshalPublic(a)
	y, err2 := MarshalPublic(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// Key is the key itself.
func (k PublicKey) Key() crypto.PublicKey { return k.key }
