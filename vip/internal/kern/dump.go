package kern

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"github.com/google/nftables/userdata"
	vnl "github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
)

// Chain is a chain of our table, as read.
type Chain struct {
	Name   string
	Hook   int // -1: none
	Prio   int32
	Type   string
	Policy uint32 // of one with a hook: nfAccept
	Rules  []Rule
}

// Rule is a rule of our table, as read.
type Rule struct {
	Comment string
	Sets    []string // looked up, in order
}

// nfAccept is NF_ACCEPT (linux/netfilter.h).
const nfAccept = 1

// Elem is an element of a set, as read.
type Elem struct {
	Key, Val []byte
	Chain    string // of a verdict
}

// attrs calls fn for each netlink attribute in b, until one does not fit.
// What the kernel sends is well-formed; nothing here trusts it to be.
func attrs(b []byte, fn func(typ uint16, v []byte)) {
	for len(b) >= 4 {
		l := int(binary.NativeEndian.Uint16(b))
		if l < 4 || l > len(b) {
			return
		}
		fn(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:l])
		b = b[min((l+3)&^3, len(b)):]
	}
}

func cstr(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// request runs one nfnetlink request and returns the messages of the answer
// without their nfgenmsg headers.
func request(f Family, subsys, msg, flags int, as ...*vnl.RtAttr) ([][]byte, error) {
	return nl.Dump(func() ([][]byte, error) {
		req := vnl.NewNetlinkRequest(subsys<<8|msg, flags)
		req.AddData(&vnl.Nfgenmsg{NfgenFamily: f.AF, Version: unix.NFNETLINK_V0})
		for _, a := range as {
			req.AddData(a)
		}
		out, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		for i, m := range out {
			out[i] = m[min(vnl.SizeofNfgenmsg, len(m)):]
		}
		return out, err
	})
}

func str(typ int, s string) *vnl.RtAttr { return vnl.NewRtAttr(typ, vnl.ZeroTerminated(s)) }

// absentTable tells whether a dump failed because the table or set is missing.
func absentTable(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// Chains reads the chains of our table with their rules. There are none when
// the table is absent.
func Chains(f Family) (map[string]*Chain, error) {
	msgs, err := request(f, unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP)
	if err != nil && !absentTable(err) {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	out := map[string]*Chain{}
	for _, m := range msgs {
		c := &Chain{Hook: -1}
		var table string
		attrs(m, func(t uint16, v []byte) {
			switch t {
			case unix.NFTA_CHAIN_TABLE:
				table = cstr(v)
			case unix.NFTA_CHAIN_NAME:
				c.Name = cstr(v)
			case unix.NFTA_CHAIN_TYPE:
				c.Type = cstr(v)
			case unix.NFTA_CHAIN_POLICY:
				if len(v) == 4 {
					c.Policy = binary.BigEndian.Uint32(v)
				}
			case unix.NFTA_CHAIN_HOOK:
				attrs(v, func(t uint16, v []byte) {
					if len(v) != 4 {
						return
					}
					switch t {
					case unix.NFTA_HOOK_HOOKNUM:
						c.Hook = int(binary.BigEndian.Uint32(v))
					case unix.NFTA_HOOK_PRIORITY:
						c.Prio = int32(binary.BigEndian.Uint32(v))
					}
				})
			}
		})
		if table == Table {
			out[c.Name] = c
		}
	}
	if len(out) == 0 {
		return out, nil
	}
	msgs, err = request(f, unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, str(unix.NFTA_RULE_TABLE, Table))
	if err != nil && !absentTable(err) {
		return nil, fmt.Errorf("list nftables rules: %w", err)
	}
	for _, m := range msgs {
		var table, chain string
		var r Rule
		attrs(m, func(t uint16, v []byte) {
			switch t {
			case unix.NFTA_RULE_TABLE:
				table = cstr(v)
			case unix.NFTA_RULE_CHAIN:
				chain = cstr(v)
			case unix.NFTA_RULE_USERDATA:
				r.Comment, _ = userdata.GetString(v, userdata.TypeComment)
			case unix.NFTA_RULE_EXPRESSIONS:
				attrs(v, func(_ uint16, v []byte) {
					var name string
					attrs(v, func(t uint16, v []byte) {
						switch {
						case t == unix.NFTA_EXPR_NAME:
							name = cstr(v)
						case t == unix.NFTA_EXPR_DATA && name == "lookup":
							attrs(v, func(t uint16, v []byte) {
								if t == unix.NFTA_LOOKUP_SET {
									r.Sets = append(r.Sets, cstr(v))
								}
							})
						}
					})
				})
			}
		})
		if c := out[chain]; c != nil && table == Table {
			c.Rules = append(c.Rules, r)
		}
	}
	return out, nil
}

// Is tells whether a chain has the hook of b and the rules with exactly these
// comments.
func (c *Chain) Is(b Base, comments ...string) bool {
	if c == nil || len(c.Rules) != len(comments) {
		return false
	}
	if b.Hook == nil && c.Hook >= 0 ||
		b.Hook != nil && (c.Hook != int(*b.Hook) || c.Prio != int32(*b.Prio) || c.Type != string(b.Type) || c.Policy != nfAccept) {
		return false
	}
	for i, r := range c.Rules {
		if r.Comment != comments[i] {
			return false
		}
	}
	return true
}

// HasTable tells whether our table exists.
func HasTable(f Family) (bool, error) {
	there, _, err := table(f)
	return there, err
}

func table(f Family) (there, dormant bool, err error) {
	msgs, err := request(f, unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETTABLE, unix.NLM_F_ACK, str(unix.NFTA_TABLE_NAME, Table))
	if absentTable(err) {
		return false, false, nil
	}
	if err != nil {
		return false, false, fmt.Errorf("look up nftables table: %w", err)
	}
	for _, m := range msgs {
		attrs(m, func(t uint16, v []byte) {
			if t == unix.NFTA_TABLE_FLAGS && len(v) == 4 {
				dormant = binary.BigEndian.Uint32(v)&unix.NFT_TABLE_F_DORMANT != 0
			}
		})
	}
	return true, dormant, nil
}

// TableFault says what spoils our table though its own chains may be right. ours
// tells which chains belong to it.
func TableFault(f Family, chains map[string]*Chain, ours func(name string) bool) (string, error) {
	_, dormant, err := table(f)
	switch {
	case err != nil:
		return "", err
	case dormant:
		return "table " + Table + " is dormant", nil
	}
	for name := range chains {
		if !ours(name) {
			return "table " + Table + " has a chain " + name + " that is not ours", nil
		}
	}
	return "", nil
}

// ErrNoSet: the set does not exist.
var ErrNoSet = errors.New("nftables set does not exist")

// Elems reads the elements of a set of our table.
func Elems(f Family, set string) ([]Elem, error) {
	msgs, err := request(f, unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP,
		str(unix.NFTA_SET_ELEM_LIST_TABLE, Table), str(unix.NFTA_SET_ELEM_LIST_SET, set))
	if absentTable(err) {
		return nil, fmt.Errorf("set %s: %w", set, ErrNoSet)
	}
	if err != nil {
		return nil, fmt.Errorf("list nftables set %s: %w", set, err)
	}
	var out []Elem
	for _, m := range msgs {
		out = appendElems(out, m)
	}
	return out, nil
}

func appendElems(out []Elem, m []byte) []Elem {
	attrs(m, func(t uint16, v []byte) {
		if t != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return
		}
		attrs(v, func(_ uint16, v []byte) {
			var e Elem
			attrs(v, func(t uint16, v []byte) {
				switch t {
				case unix.NFTA_SET_ELEM_KEY:
					attrs(v, func(t uint16, v []byte) {
						if t == unix.NFTA_DATA_VALUE {
							e.Key = v
						}
					})
				case unix.NFTA_SET_ELEM_DATA:
					attrs(v, func(t uint16, v []byte) {
						switch t {
						case unix.NFTA_DATA_VALUE:
							e.Val = v
						case unix.NFTA_DATA_VERDICT:
							attrs(v, func(t uint16, v []byte) {
								if t == unix.NFTA_VERDICT_CHAIN {
									e.Chain = cstr(v)
								}
							})
						}
					})
				}
			})
			out = append(out, e)
		})
	})
	return out
}

// Has tells whether a set of our table has an element with the key. It is
// false when the set, or the table, is absent.
func Has(f Family, set string, key []byte) (bool, error) {
	list := vnl.NewRtAttr(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS, nil)
	elem := list.AddRtAttr(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, nil)
	elem.AddRtAttr(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_KEY, nil).AddRtAttr(unix.NFTA_DATA_VALUE, key)
	msgs, err := request(f, unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_ACK,
		str(unix.NFTA_SET_ELEM_LIST_TABLE, Table), str(unix.NFTA_SET_ELEM_LIST_SET, set), list)
	if absentTable(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up in nftables set %s: %w", set, err)
	}
	return len(msgs) > 0, nil
}
