package nft

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
)

// formVersion is part of every rule's comment: another form of the rules is
// another version, and what an older agent left is rewritten.
const formVersion = 2

// version is formVersion, but for tests.
var version = formVersion

var native = binary.NativeEndian

// ruleset is a table of family ip, but for the elements of its sets, and for
// chains without a hook. Writing it replaces the rules.
//
// Rules carry a digest of the whole rule set in their comments: a rule can't be
// changed in place, so that reading the comments is reading the rules.
type ruleset struct {
	name   string
	sets   []set
	chains []chain
}

type set struct {
	name string
	key  nftables.SetDatatype
	data *nftables.SetDatatype // of a map
}

type chain struct {
	name  string
	typ   nftables.ChainType
	hook  *nftables.ChainHook // nil: jumped to
	prio  int32
	rules []rule
}

// rule is a rule with its text, for the digest.
type rule struct {
	text  string
	exprs []expr.Any
}

// ctOrig loads a property of the tracked connection's original direction into a
// register, or sets it from there. google/nftables has neither the direction of
// a zone nor addresses by their family. (It has addresses of any family, but
// those have no length of their own, and nft(8) up to 1.0.6 aborts over a
// concatenation with one, whatever it was asked.)
type ctOrig struct {
	expr.Any // none
	key, reg uint32
	set      bool
}

func (r ruleset) table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyIPv4, Name: r.name}
}

func digest(parts ...any) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintln(h, p)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func (r ruleset) digest() string {
	parts := []any{version, r.name}
	for _, s := range r.sets {
		parts = append(parts, "set", s.name, s.key.Name)
	}
	for _, c := range r.chains {
		parts = append(parts, "chain", c.name, c.typ, c.prio)
		if c.hook != nil {
			parts = append(parts, *c.hook)
		}
		for _, x := range c.rules {
			parts = append(parts, x.text)
		}
	}
	return digest(parts...)
}

func comment(digest, chain string, i int) string {
	return "shoal " + digest + " " + chain + " " + strconv.Itoa(i)
}

// sockOptions make room for the answers to each message of a transaction, which
// come all at once.
func sockOptions(c *netlink.Conn) error {
	return errors.Join(c.SetWriteBuffer(4<<20), c.SetReadBuffer(4<<20))
}

// tx opens a connection that sends what is buffered in one transaction, in the
// calling thread's namespace.
func tx() (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithSockOptions(sockOptions))
	if err != nil {
		return nil, fmt.Errorf("nftables socket: %w", err)
	}
	return c, nil
}

// reader opens a connection that stays open.
func reader() (*nftables.Conn, error) {
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(sockOptions))
	if err != nil {
		return nil, fmt.Errorf("nftables socket: %w", err)
	}
	return c, nil
}

// chainsOf lists a table's chains; none if the table is absent.
func chainsOf(c *nftables.Conn, table string) (map[string]*nftables.Chain, error) {
	all, err := c.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	out := map[string]*nftables.Chain{}
	for _, x := range all {
		if x.Table.Name == table {
			out[x.Name] = x
		}
	}
	return out, nil
}

// comments reads the comments of a table's rules, by chain. The rules themselves
// are not decoded: google/nftables fails on the direction of a ct expression.
func comments(table string) (map[string][]string, error) {
	rules, err := nl.Rules(unix.NFPROTO_IPV4, table, "")
	if err != nil {
		return nil, err
	}
	out := map[string][]string{}
	for _, as := range rules {
		var of, chain, says string
		for _, a := range as {
			switch a.Type {
			case unix.NFTA_RULE_TABLE:
				of = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_CHAIN:
				chain = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_USERDATA:
				says, _ = userdata.GetString(a.Data, userdata.TypeComment)
			}
		}
		if of == table {
			out[chain] = append(out[chain], says)
		}
	}
	return out, nil
}

// check tells what is wrong with the table, whose chains are given. Local
// balancers' chains are not its to judge.
func (r ruleset) check(c *nftables.Conn, chains map[string]*nftables.Chain) (fault string, err error) {
	d := r.digest()
	all, err := comments(r.name)
	if err != nil {
		return "", err
	}
	t, err := c.ListTableOfFamily(r.name, nftables.TableFamilyIPv4)
	switch {
	case errors.Is(err, unix.ENOENT) || err == nil && t == nil:
		return "it is missing", nil
	case err != nil:
		return "", fmt.Errorf("look up nftables table %s: %w", r.name, err)
	case binary.BigEndian.Uint32(native.AppendUint32(nil, t.Flags))&unix.NFT_TABLE_F_DORMANT != 0: // not converted by the library
		return "it is dormant", nil
	}
	for name := range chains {
		_, _, local := parseLocalChain(name)
		if !local && !slices.ContainsFunc(r.chains, func(c chain) bool { return c.name == name }) {
			return "chain " + name + " is not ours", nil
		}
	}
	for _, want := range r.chains {
		have := chains[want.name]
		if have == nil {
			return "chain " + want.name + " is missing", nil
		}
		if want.hook != nil && (have.Type != want.typ || have.Hooknum == nil || *have.Hooknum != *want.hook || have.Priority == nil ||
			int32(*have.Priority) != want.prio || have.Policy == nil || *have.Policy != nftables.ChainPolicyAccept) {
			return "chain " + want.name + " has another hook or policy", nil
		}
		says := all[want.name]
		if len(says) != len(want.rules) {
			return "chain " + want.name + " has other rules", nil
		}
		for i := range says {
			if says[i] != comment(d, want.name, i) {
				return "chain " + want.name + " has other rules", nil
			}
		}
	}
	sets, err := c.GetSets(r.table())
	if err != nil {
		return "", fmt.Errorf("list nftables sets of %s: %w", r.name, err)
	}
	there := map[string]bool{}
	for _, s := range sets {
		there[s.Name] = true
	}
	for _, s := range r.sets {
		if !there[s.name] {
			return "set " + s.name + " is missing", nil
		}
	}
	return "", nil
}

// write makes the table, or makes one that stands into it without a gap: sets keep
// their elements, and balancers of local tasks their chains.
func (r ruleset) write() error {
	t := nl.RuleTable{Family: nftables.TableFamilyIPv4, Name: r.name, Keep: func(name string) bool {
		_, _, local := parseLocalChain(name)
		return local
	}}
	for _, s := range r.sets {
		ks := &nftables.Set{Name: s.name, KeyType: s.key, Concatenation: strings.Contains(s.key.Name, ".")}
		if s.data != nil {
			ks.IsMap, ks.DataType = true, *s.data
		}
		t.Sets = append(t.Sets, ks)
	}
	d := r.digest()
	for _, ch := range r.chains {
		c := nl.RuleChain{Name: ch.name, Type: ch.typ, Hook: ch.hook, Prio: ch.prio, Policy: nftables.ChainPolicyAccept}
		for i, x := range ch.rules {
			c.Rules = append(c.Rules, nl.TableRule{Exprs: x.exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, comment(d, ch.name, i))})
		}
		t.Chains = append(t.Chains, c)
	}
	err := t.Replace()
	if err != nil && !errors.Is(err, unix.EPERM) {
		// What stands is none of ours, in whatever form.
		if derr := delTable(r.name); derr != nil {
			return errors.Join(err, derr)
		}
		err = t.Replace()
	}
	return err
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// Raw implements nl.RawExpr.
func (e ctOrig) Raw() ([]byte, error) {
	reg := netlink.Attribute{Type: unix.NFTA_CT_DREG, Data: be32(e.reg)}
	if e.set {
		reg.Type = unix.NFTA_CT_SREG
	}
	return nl.EncodeExpr("ct", []netlink.Attribute{
		{Type: unix.NFTA_CT_KEY, Data: be32(e.key)},
		reg,
		{Type: unix.NFTA_CT_DIRECTION, Data: []byte{0}}, // IP_CT_DIR_ORIGINAL
	})
}

// elem is an element of a set or map.
type elem struct {
	set      string
	key, val []byte
	chain    string // of a verdict
}

// elems reads the elements of a set by their keys; none if it is absent.
func elems(c *nftables.Conn, table, name string) (map[string]elem, error) {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: table}
	sets, err := c.GetSets(t)
	if err != nil {
		return nil, fmt.Errorf("list nftables sets of %s: %w", table, err)
	}
	out := map[string]elem{}
	for _, s := range sets {
		if s.Name != name {
			continue
		}
		es, err := c.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("list nftables set %s: %w", name, err)
		}
		for _, e := range es {
			x := elem{set: name, key: e.Key, val: e.Val}
			if name == mapLocal {
				x.val, x.chain = nil, verdictChain(e.Val)
			}
			out[string(e.Key)] = x
		}
	}
	return out, nil
}

// verdictChain is the chain that a verdict leads to: the library gives a map's
// verdicts as the kernel's nested attributes.
func verdictChain(b []byte) string {
	as, err := netlink.UnmarshalAttributes(b)
	if err != nil {
		return ""
	}
	for _, a := range as {
		if a.Type&nl.AttrTypeMask == unix.NFTA_VERDICT_CHAIN {
			return strings.TrimRight(string(a.Data), "\x00")
		}
	}
	return ""
}

// put sets elements, replacing those of the same key, in one transaction.
func put(table string, es ...elem) error {
	return change(table, es, true)
}

// remove deletes elements; those that are absent, or whose table is, are no
// error.
func remove(table string, es ...elem) error {
	return change(table, es, false)
}

// change tries without looking first, because reading a set costs by its size:
// one port of a range of thousands would cost as much as all of them.
func change(table string, es []elem, add bool) error {
	c, err := tx()
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := e.change(c, table, add); err != nil {
			return err
		}
	}
	// It fails when an element is there with another value, or not at all.
	if c.Flush() == nil {
		return nil
	}
	return changeSlowly(table, es, add)
}

func (e elem) change(c *nftables.Conn, table string, add bool) error {
	s := &nftables.Set{Table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: table}, Name: e.set, IsMap: e.val != nil || e.chain != ""}
	x := nftables.SetElement{Key: e.key}
	fn := c.SetDeleteElements
	if add {
		fn, x.Val = c.SetAddElements, e.val
		if e.chain != "" {
			x.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: e.chain}
		}
	}
	if err := fn(s, []nftables.SetElement{x}); err != nil {
		return fmt.Errorf("nftables set %s: %w", e.set, err)
	}
	return nil
}

func changeSlowly(table string, es []elem, add bool) error {
	r, err := reader()
	if err != nil {
		return err
	}
	defer r.CloseLasting()
	if !add {
		chains, err := chainsOf(r, table)
		if err != nil || len(chains) == 0 {
			return err
		}
	}
	c, err := tx()
	if err != nil {
		return err
	}
	have := map[string]map[string]elem{}
	n := 0
	for _, e := range es {
		if have[e.set] == nil {
			if have[e.set], err = elems(r, table, e.set); err != nil {
				return err
			}
		}
		old, there := have[e.set][string(e.key)]
		same := string(old.val) == string(e.val) && old.chain == e.chain
		if there && (!add || !same) {
			n++
			if err := e.change(c, table, false); err != nil {
				return err
			}
		}
		if add && (!there || !same) {
			n++
			if err := e.change(c, table, true); err != nil {
				return err
			}
		}
	}
	if n == 0 {
		return nil
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("change nftables table %s: %w", table, err)
	}
	return nil
}

// delTable deletes a table; one that is absent is no error.
func delTable(name string) error {
	c, err := tx()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
	c.AddTable(t)
	c.DelTable(t)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete nftables table %s: %w", name, err)
	}
	return nil
}
