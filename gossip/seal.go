package gossip

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
)

// Everything on the wire is sealed with AES-256-GCM here, beneath memberlist,
// which is given neither keyring nor label. Its own encryption would leave the
// label (our cluster's ID) readable, expand the key anew for each packet, and
// can be made to panic by whoever holds the key (security.go: pkcs7decode of a
// padding longer than the text; net.go: readStream of an empty plaintext). And
// what is opened here can be looked at before memberlist decodes it: see wall.go.
//
// A frame is
//
//	form (1 byte) | key ID (4) | nonce (12) | ciphertext and tag (16 more than the text)
//
// The cluster's ID is in the additional data: the frames of another cluster open
// nowhere else, even with the same key. Nonces are random. Of 96 bits of them,
// 2^32 may be drawn with one key for a chance of 2^-32 that two are the same
// (NIST SP 800-38D section 8.3): 1,000 nodes that send 50 packets a second each
// reach that in a day. Keys are therefore changed twice as often, whatever
// else happens (control: gossipKeyAge).

// KeySize is the length of a gossip key in bytes.
const KeySize = 32

// Key is one key of the gossip keyring.
type Key struct {
	// ID tells keys apart on the wire; a later key has a greater one.
	ID     uint32
	Secret []byte // KeySize
}

// Keyring is what a node opens frames with, and seals them.
type Keyring struct {
	// Use is the ID of the key to seal with.
	Use uint32
	// Keys are those to open with: the one of Use, and the one that was before it
	// or comes after.
	Keys []Key
}

// maxKeys bounds a keyring: old, current and next.
const maxKeys = 3

const (
	sealForm   = 1
	sealHeader = 1 + 4 + 12
	// sealOverhead is by how much a frame is longer than its text.
	sealOverhead = sealHeader + 16
)

// opened errors; they are counted, not told one by one.
var (
	errSealForm = errors.New("not a sealed gossip frame")
	errSealKey  = errors.New("sealed with a key that this node does not have")
	errSealOpen = errors.New("does not open: forged, damaged, or of another cluster")
)

// ring is a Keyring made ready. It is never changed.
type ring struct {
	use  uint32
	seal cipher.AEAD
	open map[uint32]cipher.AEAD
}

func newRing(k Keyring) (*ring, error) {
	if len(k.Keys) == 0 || len(k.Keys) > maxKeys {
		return nil, fmt.Errorf("gossip: keyring of %d keys: want 1 to %d", len(k.Keys), maxKeys)
	}
	r := &ring{use: k.Use, open: make(map[uint32]cipher.AEAD, len(k.Keys))}
	for _, key := range k.Keys {
		if len(key.Secret) != KeySize {
			return nil, fmt.Errorf("gossip: key %d has %d bytes: want %d", key.ID, len(key.Secret), KeySize)
		}
		if r.open[key.ID] != nil {
			return nil, fmt.Errorf("gossip: key %d is in the keyring twice", key.ID)
		}
		block, err := aes.NewCipher(key.Secret)
		if err != nil {
			return nil, err
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			return nil, err
		}
		r.open[key.ID] = aead
	}
	if r.seal = r.open[k.Use]; r.seal == nil {
		return nil, fmt.Errorf("gossip: key %d, which is to be used, is not in the keyring", k.Use)
	}
	return r, nil
}

// sealer seals and opens frames of one cluster.
type sealer struct {
	packet, stream []byte // additional data, by use
	ring           atomic.Pointer[ring]
}

func newSealer(cluster string, k Keyring) (*sealer, error) {
	r, err := newRing(k)
	if err != nil {
		return nil, err
	}
	s := &sealer{packet: aad("shoal gossip packet", cluster), stream: aad("shoal gossip stream", cluster)}
	s.ring.Store(r)
	return s, nil
}

// aad is additional data of fixed length.
func aad(use, cluster string) []byte {
	h := sha256.Sum256([]byte(use + "\x00" + cluster))
	return h[:]
}

// sealFrame appends a frame to dst.
func (s *sealer) sealFrame(dst, text, aad []byte) []byte {
	r := s.ring.Load()
	dst = append(dst, sealForm)
	dst = binary.BigEndian.AppendUint32(dst, r.use)
	n := len(dst)
	dst = append(dst, make([]byte, 12)...)
	rand.Read(dst[n:]) // never fails (crypto/rand)
	return r.seal.Seal(dst, dst[n:n+12], text, aad)
}

// openFrame opens a frame in place.
func (s *sealer) openFrame(b, aad []byte) ([]byte, error) {
	if len(b) < sealOverhead || b[0] != sealForm {
		return nil, errSealForm
	}
	key := s.ring.Load().open[binary.BigEndian.Uint32(b[1:5])]
	if key == nil {
		return nil, errSealKey
	}
	text := b[sealHeader:]
	out, err := key.Open(text[:0], b[5:sealHeader], text, aad)
	if err != nil {
		return nil, errSealOpen
	}
	return out, nil
}
