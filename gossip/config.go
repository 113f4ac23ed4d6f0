package gossip

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/shoalnet/shoal/spec"
)

// Config of a node's gossip.
type Config struct {
	NodeID, Name string
	Number       int
	Role         string // spec.RoleManager or spec.RoleWorker
	// Cluster is the cluster's ID. It is part of all that is sealed and signed;
	// what is of another cluster is dropped.
	Cluster string
	// Keys seal and open all that is sent; see [Gossip.SetKeys].
	Keys Keyring
	// Signer signs what this node says: Ed25519 or P-256. See [Gossip.SetSigner].
	Signer crypto.Signer
	// Addr and Port are bound, TCP and UDP, and advertised; nothing else is
	// listened on. Port 0 takes a free one (see [Gossip.Addr]).
	Addr netip.Addr
	Port int
	// ControlPort is told to the other nodes, with Number and Role.
	ControlPort int
	// DataDir gets a folder gossip with the boot epoch, the durable peer list
	// and the others' records.
	DataDir string
	Log     *slog.Logger // nil: slog.Default
	// Transport replaces the sockets on Addr and Port, in tests.
	Transport memberlist.Transport
	// Present tells whether the machine at addr is there, with or without an agent
	// that works. nil: that is not asked.
	Present func(ctx context.Context, addr netip.AddrPort) bool
	Tuning  Tuning
}

// Tuning sets intervals and bounds. The zero value of each field stands for
// its default, which suits a LAN.
type Tuning struct {
	// ProbeInterval is the time between memberlist's probes of one node after
	// the other. A probe fails when the node answered neither a ping within
	// ProbeTimeout, nor one by up to three others, nor one over TCP, by the end
	// of the interval. ProbeTimeout is kept below half the interval, so that
	// the helpers' "no answer either" (which they send after ProbeTimeout)
	// comes within it; with memberlist's defaults of 500 ms and 1 s it always
	// comes too late, and the prober blames itself (Lifeguard) for every dead
	// node and slows down.
	ProbeInterval, ProbeTimeout time.Duration
	// SuspicionMult: a suspected node is declared dead after SuspicionMult ×
	// max(1, log10 n) × ProbeInterval when SuspicionMult−2 others confirm;
	// without, after up to SuspicionMaxMult times as long.
	//
	// With the defaults and up to 10 nodes: ≤ 0.5 s until one of them probes
	// it, 0.5 s of probe, 1.5 s of suspicion, 2 to 3 s in all. In that time a
	// living node has to miss a dozen chances to refute, over UDP and TCP, by
	// several paths, and our own pings besides (see member.holding). Shorter
	// would buy little: the half second to "suspect" is the detector's. One
	// survivor of many has nobody to confirm, and finds all of them dead after
	// 4 s: 1 s until it accuses (AccuseAfter), 3 s of suspicion.
	SuspicionMult, SuspicionMaxMult int
	// GossipInterval is the time between gossip packets to 3 random nodes:
	// suspicions and refutations travel by them.
	GossipInterval time.Duration
	// PushPullInterval is the time between memberlist's exchanges of all
	// members with a random one; memberlist stretches it above 32 nodes.
	PushPullInterval time.Duration

	// PingInterval is the period of the detector; its timeout is ProbeTimeout.
	PingInterval time.Duration
	// SuspectAfter is how many pings in a row must fail for this node to suspect
	// another, and AccuseAfter for it to say so to the others (see wall.accuse).
	SuspectAfter, AccuseAfter int
	// DirectPeers is the cluster size (without this node) up to which every
	// change goes to all and every peer is pinged in each round; beyond, to
	// random ones of this count.
	DirectPeers int
	// GapWait is how long a delta waits for one before it that may just have
	// been overtaken.
	GapWait time.Duration
	// DigestInterval is the time between digest exchanges with a random peer.
	DigestInterval time.Duration
	// FetchTimeout bounds one fetch from one peer.
	FetchTimeout time.Duration
	// RejoinInterval is the first delay between attempts at an address of the
	// peer list that no living member has; it doubles up to RejoinMax, and is
	// stretched so that all such addresses together make some 3 attempts a
	// second.
	RejoinInterval, RejoinMax time.Duration
	// SyncWait is when a node none of whose peers answers counts as synced.
	SyncWait time.Duration
	// OrphanAge is for how long a node whose machine is there, though its agent
	// is not, is held for suspect instead of dead. Its tasks go on without their
	// agent, and so do their connections until it is back.
	OrphanAge time.Duration
	// LookInterval is the time between looks at the machine of a suspected node, and
	// that which one has for its answer; LookMisses is how many in a row must have had
	// none until a node without an agent is dead. A machine that works may miss some: its
	// processors are busy, or all the world calls it.
	LookInterval time.Duration
	LookMisses   int
	// Tombstones kept per node: at most TombstoneMax, none older than
	// TombstoneAge.
	TombstoneMax int
	TombstoneAge time.Duration
	// ForgetAfter is how long a dead node's state is kept unless
	// [Gossip.Forget] is called.
	ForgetAfter time.Duration
	// UDPSize is the largest UDP payload in bytes. 1400 is memberlist's
	// default; it fits an Ethernet frame with room for a tunnel's header.
	UDPSize int
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (t Tuning) withDefaults() Tuning {
	def(&t.ProbeInterval, 500*time.Millisecond)
	def(&t.ProbeTimeout, 225*time.Millisecond)
	def(&t.OrphanAge, 12*time.Second)
	def(&t.LookInterval, 250*time.Millisecond)
	def(&t.LookMisses, 4)
	def(&t.SuspicionMult, 3)
	def(&t.SuspicionMaxMult, 2)
	def(&t.GossipInterval, 100*time.Millisecond)
	def(&t.PushPullInterval, 15*time.Second)
	def(&t.PingInterval, 250*time.Millisecond)
	def(&t.SuspectAfter, 2)
	def(&t.AccuseAfter, 4)
	def(&t.DirectPeers, 64)
	def(&t.GapWait, 10*time.Millisecond)
	def(&t.DigestInterval, 2*time.Second)
	def(&t.FetchTimeout, 3*time.Second)
	def(&t.RejoinInterval, time.Second)
	def(&t.RejoinMax, 5*time.Second)
	def(&t.SyncWait, 3*time.Second)
	def(&t.TombstoneMax, 1024)
	def(&t.TombstoneAge, 10*time.Minute)
	def(&t.ForgetAfter, 24*time.Hour)
	def(&t.UDPSize, 1400)
	return t
}

// Fixed bounds.
const (
	// streamTimeout bounds a stream as a whole: memberlist sets no deadline on
	// user messages it sends (net.go, sendUserMsg), so a peer that stops
	// reading would hold one for the kernel's 15 minutes.
	streamTimeout = 5 * time.Second
	dialTimeout   = 2 * time.Second
	// queueMax bounds each rumour queue; the oldest go first.
	queueMax = 1024
	// reliableMax bounds messages waiting for TCP; reliableParallel are sent
	// at a time.
	reliableMax      = 4096
	reliableParallel = 16
	// serveMax and fetchMax bound fetches served and made at a time.
	serveMax = 16
	fetchMax = 16
	// waitersMax bounds barriers of others waiting here, waiterAge their time.
	waitersMax = 4096
	waiterAge  = 30 * time.Second
	// parkedMax bounds deltas of one node that wait for an earlier one.
	parkedMax = 64
	// strangersMax and strangerAge bound records of nodes memberlist has not
	// introduced yet.
	strangersMax = 1024
	strangerAge  = time.Minute
	// leftShown is how long a leave is spread by digests.
	leftShown = time.Minute
	// leftKept is how long the state of a node that left is kept, so that
	// late messages don't bring it back.
	leftKept = 10 * time.Minute
	// stalled: a detector round this much late was not run by a healthy
	// process; it judges nobody.
	stalled = 100 * time.Millisecond
	// awayRest stretches the time between looks at the machine of a dead node.
	awayRest = 20
	// clusterMax bounds Cluster.
	clusterMax = 64
	// fetchBytesMax bounds what one fetch brings: 100,000 endpoints are some 40 MB.
	fetchBytesMax = 64 << 20
	// syncMax is the longest that a fetch in progress delays Synced.
	syncMax = 10 * time.Second
	// joinGrace lets a Join that follows Run count as a peer for Synced.
	joinGrace = 100 * time.Millisecond
)

func (c Config) validate() error {
	switch {
	case c.NodeID == "" || len(c.NodeID) > maxID:
		return fmt.Errorf("gossip: node ID %q: use 1 to %d characters", c.NodeID, maxID)
	case len(c.Name) > spec.MaxNameLen:
		return fmt.Errorf("gossip: node name %q is longer than %d characters", c.Name, spec.MaxNameLen)
	case c.Number < 0 || c.Number > spec.MaxNodes:
		return fmt.Errorf("gossip: node number %d is out of range: use 0 to %d", c.Number, spec.MaxNodes)
	case c.Cluster == "" || len(c.Cluster) > clusterMax:
		return fmt.Errorf("gossip: cluster ID %q: use 1 to %d characters", c.Cluster, clusterMax)
	case !c.Addr.IsValid() || c.Addr.IsUnspecified():
		return fmt.Errorf("gossip: address %s can't be advertised: give one of this machine's own", c.Addr)
	case c.Port < 0 || c.Port > 65535:
		return fmt.Errorf("gossip: port %d is out of range: use 1 to 65535 (--gossip-port)", c.Port)
	case c.DataDir == "":
		return fmt.Errorf("gossip: no data directory")
	}
	return checkSigner(c.Signer)
}
