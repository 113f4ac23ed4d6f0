package kern

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/vip"
)

// elemChunk is how many set elements go into one message: at up to 60 octets
// each (an IPv6 map element) they stay within the 65,535 octets that one
// netlink attribute can have.
const elemChunk = 1000

// Tx is one nftables transaction on our table of one family, in the calling
// thread's namespace. Methods buffer; Commit sends.
type Tx struct {
	c     *nftables.Conn
	table *nftables.Table
	ids   uint32
	n     int
	err   error
}

// Begin starts a transaction.
func Begin(f Family) *Tx {
	// Without AsLasting the library opens a socket for each batch, in the
	// namespace of the thread that flushes: nothing to close, and no answers
	// of a failed batch left to be read as those of the next.
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		// A transaction is one datagram, and each of its messages is
		// answered. These need CAP_NET_ADMIN (SO_SNDBUFFORCE), as all here does.
		if err := c.SetWriteBuffer(32 << 20); err != nil {
			return err
		}
		return c.SetReadBuffer(32 << 20)
	}))
	return &Tx{c: c, table: &nftables.Table{Name: Table, Family: f.NF}, err: err}
}

func (t *Tx) keep(err error) {
	if t.err == nil {
		t.err = err
	}
	t.n++
}

// Table adds the table.
func (t *Tx) Table() {
	t.n++
	t.c.AddTable(t.table)
}

// DelTable deletes the table with all that is in it.
func (t *Tx) DelTable() {
	t.n++
	t.c.DelTable(t.table)
}

// Len is how many messages were buffered.
func (t *Tx) Len() int { return t.n }

// Ref names a set that exists, or is added in this transaction.
func (t *Tx) Ref(name string) *nftables.Set { return &nftables.Set{Table: t.table, Name: name} }

// Set adds a named set, or map when data is not nil.
func (t *Tx) Set(name string, key nftables.SetDatatype, data *nftables.SetDatatype) *nftables.Set {
	t.ids++
	s := &nftables.Set{Table: t.table, ID: t.ids, Name: name, KeyType: key}
	if data != nil {
		s.IsMap, s.DataType = true, *data
	}
	t.keep(t.c.AddSet(s, nil))
	return s
}

// Anonymous adds a set (or map) that belongs to the rule that looks it up.
func (t *Tx) Anonymous(key nftables.SetDatatype, data *nftables.SetDatatype, elems []nftables.SetElement) *nftables.Set {
	t.ids++
	s := &nftables.Set{Table: t.table, ID: t.ids, Name: "__set%d", Anonymous: true, Constant: true, KeyType: key, Size: uint32(len(elems))}
	if data != nil {
		s.Name, s.IsMap, s.DataType = "__map%d", true, *data
	}
	t.keep(t.c.AddSet(s, nil))
	// The library refuses elements for an anonymous set after its creation;
	// the kernel does so only once a rule uses it.
	open := *s
	open.Anonymous = false
	t.Add(&open, elems)
	return s
}

// Protocols adds the anonymous set of the protocols that are balanced.
func (t *Tx) Protocols(protos ...byte) *nftables.Set {
	var es []nftables.SetElement
	for _, p := range protos {
		es = append(es, nftables.SetElement{Key: []byte{p}})
	}
	return t.Anonymous(nftables.TypeInetProto, nil, es)
}

// Add adds elements. One that is there with the same data is no error.
func (t *Tx) Add(s *nftables.Set, es []nftables.SetElement) {
	for len(es) > 0 {
		n := min(len(es), elemChunk)
		t.keep(t.c.SetAddElements(s, es[:n]))
		es = es[n:]
	}
}

// Del deletes elements; one that is not there fails the transaction.
func (t *Tx) Del(s *nftables.Set, es []nftables.SetElement) {
	for len(es) > 0 {
		n := min(len(es), elemChunk)
		t.keep(t.c.SetDeleteElements(s, es[:n]))
		es = es[n:]
	}
}

// Flush deletes all elements of a set.
func (t *Tx) Flush(s *nftables.Set) {
	t.n++
	t.c.FlushSet(s)
}

// Chain adds a chain that is jumped to, or keeps it as it is, and empties it.
func (t *Tx) Chain(name string) *nftables.Chain {
	c := t.KeepChain(name)
	t.n++
	t.c.FlushChain(c)
	return c
}

// KeepChain adds a chain that is jumped to, or keeps it with its rules.
func (t *Tx) KeepChain(name string) *nftables.Chain {
	t.n++
	return t.c.AddChain(&nftables.Chain{Table: t.table, Name: name})
}

// Base is a chain with a hook.
type Base struct {
	Name string
	Type nftables.ChainType
	Hook *nftables.ChainHook
	Prio *nftables.ChainPriority
}

// BaseChain adds a chain with a hook, or keeps it as it is, and empties it.
func (t *Tx) BaseChain(b Base) *nftables.Chain {
	t.n += 2
	accept := nftables.ChainPolicyAccept
	c := t.c.AddChain(&nftables.Chain{Table: t.table, Name: b.Name, Type: b.Type, Hooknum: b.Hook, Priority: b.Prio, Policy: &accept})
	t.c.FlushChain(c)
	return c
}

// DelChain empties and deletes a chain.
func (t *Tx) DelChain(name string) {
	t.n += 2
	c := &nftables.Chain{Table: t.table, Name: name}
	t.c.FlushChain(c)
	t.c.DelChain(c)
}

// DelOthers deletes the chains that don't belong to our table.
func (t *Tx) DelOthers(f Family, ours func(name string) bool) {
	chains, err := Chains(f)
	if err != nil {
		t.keep(err)
		return
	}
	for name := range chains {
		if !ours(name) {
			t.DelChain(name)
		}
	}
}

// Over is what of a table that stands is kept when its base is written.
type Over int

// From the one that no packet notices on.
const (
	KeepChains    Over = iota // all but chains that are not ours
	ReplaceChains             // as well, but chains with a hook are made anew, which may be of another type
	ReplaceTable              // nothing
)

// WriteBase writes the base of a network's table, over as much of what stands as
// can be kept: another version's chains, or a stranger's, may be of another type,
// and so may its sets.
func WriteBase(log *slog.Logger, n vip.Network, write func(Over) error) error {
	err := write(KeepChains)
	if err != nil && !errors.Is(err, unix.EPERM) {
		log.Info("replacing the chains of an nftables table", "network", n.Name, "table", Table, "because", err)
		err = write(ReplaceChains)
	}
	if err != nil && !errors.Is(err, unix.EPERM) {
		// The servers follow in the next pass.
		log.Warn("replacing nftables table", "network", n.Name, "table", Table, "because", err)
		err = write(ReplaceTable)
	}
	return err
}

// Clear begins a transaction that writes the base of the table.
func (t *Tx) Clear(f Family, over Over, ours func(name string) bool) {
	t.Table()
	switch over {
	case KeepChains:
		t.DelOthers(f, ours)
	case ReplaceChains:
		chains, err := Chains(f)
		t.keep(err)
		t.DelOthers(f, func(name string) bool { return ours(name) && (chains[name] == nil || chains[name].Hook < 0) })
	case ReplaceTable:
		t.DelTable()
		t.Table()
	}
}

// Rule appends a rule with a comment.
func (t *Tx) Rule(c *nftables.Chain, comment string, es ...expr.Any) {
	t.n++
	t.c.AddRule(t.rule(c, comment, es))
}

// First puts a rule with a comment before the others of its chain.
func (t *Tx) First(c *nftables.Chain, comment string, es ...expr.Any) {
	t.n++
	t.c.InsertRule(t.rule(c, comment, es))
}

func (t *Tx) rule(c *nftables.Chain, comment string, es []expr.Any) *nftables.Rule {
	return &nftables.Rule{Table: t.table, Chain: c, Exprs: es, UserData: userdata.AppendString(nil, userdata.TypeComment, comment)}
}

// DelRule deletes a rule; one that is not there fails the transaction.
func (t *Tx) DelRule(chain string, handle uint64) {
	t.keep(t.c.DelRule(&nftables.Rule{Table: t.table, Chain: &nftables.Chain{Table: t.table, Name: chain}, Handle: handle}))
}

// Commit sends the transaction. An empty one succeeds.
func (t *Tx) Commit() error {
	if t.err != nil {
		return fmt.Errorf("nftables table %s: %w", Table, t.err)
	}
	if t.n == 0 {
		return nil
	}
	if err := t.c.Flush(); err != nil {
		return fmt.Errorf("nftables table %s: %w", Table, err)
	}
	return nil
}

// Digest is a short fingerprint of parts, for a rule's comment.
func Digest(parts ...any) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%v\n", p)
	}
	return hex.EncodeToString(h.Sum(nil)[:10])
}
