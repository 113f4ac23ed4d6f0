// Package deptest says which package of Shoal may import what, and why. Its test
// holds the tree against it; the arrows are drawn in docs/ARCHITECTURE.md.
package deptest

import "strings"

// Module is the path that every package of Shoal begins with.
const Module = "github.com/shoalnet/shoal"

// A Rule keeps the packages that From matches from importing what To matches,
// unless one of Except matches the importer. Patterns are paths relative to
// Module for our own packages, import paths for others; "..." at the end takes
// everything below, too.
type Rule struct {
	From, To string
	Except   []string
	Why      string
}

// Rules are all there are.
var Rules = []Rule{
	{From: "...", To: "./cmd/...", Why: "commands are for people; what two of them need goes into a package"},
	{From: "...", To: "./integration", Why: "it holds tests only"},
	{From: "./spec", To: "./...", Why: "plain values: everything imports spec, spec nothing of ours"},
	{From: "./reconcile/...", To: "./...", Except: []string{"./reconcile/..."}, Why: "the loop knows no plane"},
	{From: "./runtime", To: "./runtime/...", Why: "the interface does not know its implementations"},
	{From: "./control/state", To: "./control", Why: "the state machine is pure: raft calls it, it does not call raft"},
	{From: "...", To: "./agent", Except: []string{"./cmd/shoal/...", "./agent/..."}, Why: "the agent joins the others; none of them knows it"},
	{From: "./agent/...", To: "./internal/nl", Why: "the agent works on a laptop: the kernel is behind interfaces"},
	{From: "./agent/...", To: "./overlay/vxlan", Why: "only cmd/shoal picks implementations"},
	{From: "./agent/...", To: "./vip/ipvs", Why: "only cmd/shoal picks implementations"},
	{From: "./agent/...", To: "./vip/nft", Why: "only cmd/shoal picks implementations"},
	{From: "./agent/...", To: "./ingress/nft", Why: "only cmd/shoal picks implementations"},

	// Siblings: the agent introduces them to each other.
	sibling("./overlay/...", "./vip/..."), sibling("./overlay/...", "./ingress/..."), sibling("./overlay/...", "./dns/..."),
	sibling("./vip/...", "./overlay/..."), sibling("./vip/...", "./ingress/..."), sibling("./vip/...", "./dns/..."),
	sibling("./ingress/...", "./overlay/..."), sibling("./ingress/...", "./vip/..."), sibling("./ingress/...", "./dns/..."),
	sibling("./dns/...", "./overlay/..."), sibling("./dns/...", "./vip/..."), sibling("./dns/...", "./gossip/..."), sibling("./dns/...", "./control/..."),
	sibling("./gossip/...", "./control/..."), sibling("./gossip/...", "./dns/..."), sibling("./gossip/...", "./overlay/..."), sibling("./gossip/...", "./vip/..."),
	sibling("./control/...", "./gossip/..."), sibling("./control/...", "./overlay/..."), sibling("./control/...", "./vip/..."), sibling("./control/...", "./dns/..."),

	// One importer each: what a library is changed for is then one package.
	{From: "...", To: "github.com/hashicorp/memberlist", Except: []string{"./gossip/..."}, Why: "gossip hides memberlist"},
	{From: "...", To: "github.com/miekg/dns", Except: []string{"./dns/...", "./internal/tools/bench"}, Why: "dns hides miekg/dns"},
	{From: "...", To: "github.com/hashicorp/raft", Except: []string{"./control"}, Why: "control hides raft"},
	{From: "...", To: "crypto/tls", Except: []string{"./peer"}, Why: "one listener and one dialer between nodes"},
	{From: "...", To: "github.com/containerd/containerd/v2/client", Except: []string{"./runtime/container"}, Why: "runtime/container hides containerd"},
	{From: "...", To: "github.com/moby/ipvs", Except: []string{"./vip/ipvs"}, Why: "vip/ipvs hides moby/ipvs and what it lacks"},
	{From: "...", To: "github.com/vishvananda/netlink", Except: kernel, Why: "only these packages open netlink sockets"},
	{From: "...", To: "github.com/google/nftables", Except: kernel, Why: "only these packages open netlink sockets"},
	{From: "...", To: "github.com/spf13/cobra", Except: []string{"./cmd/shoal/..."}, Why: "the command line is cmd/shoal's"},
	{From: "...", To: "testing", Why: "no test code in the binary"},
}

// kernel are the packages that speak netlink.
var kernel = []string{"./lab", "./internal/nl", "./overlay/vxlan", "./vip/internal/...", "./vip/ipvs", "./vip/nft", "./ingress/nft", "./internal/nft/..."}

func sibling(from, to string) Rule {
	return Rule{From: from, To: to, Why: "siblings never import each other; the agent introduces them"}
}

// Broken returns the rules that the import of to by from breaks. Both are full
// import paths.
func Broken(from, to string) []Rule {
	from, to = short(from), short(to)
	var out []Rule
	for _, r := range Rules {
		if !match(r.From, from) || !match(r.To, to) {
			continue
		}
		excepted := false
		for _, e := range r.Except {
			excepted = excepted || match(e, from)
		}
		if !excepted {
			out = append(out, r)
		}
	}
	return out
}

// short writes our own paths relative to Module.
func short(path string) string {
	if path == Module {
		return "."
	}
	if rest, ok := strings.CutPrefix(path, Module+"/"); ok {
		return "./" + rest
	}
	return path
}

func match(pattern, path string) bool {
	if below, ok := strings.CutSuffix(pattern, "..."); ok {
		return strings.HasPrefix(path+"/", below)
	}
	return pattern == path
}
