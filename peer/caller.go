package peer

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/shoalnet/shoal/spec"
)

// Who is a set of kinds of callers.
type Who uint8

const (
	// Stranger has shown no certificate.
	Stranger Who = 1 << iota
	// Local came by the node's own unix socket, whose permissions are its guard.
	Local
	// Worker and Manager have shown a certificate for that role, and are on the
	// node list with it.
	Worker
	Manager
	// Removed has shown a certificate, and is no longer on the node list: it may
	// do nothing, but is told why.
	Removed Who = 1 << 7
)

// Sets of callers.
const (
	Users  = Local | Manager // a user, here or by way of a manager
	Nodes  = Local | Manager | Worker
	Anyone = Stranger | Nodes
)

func (w Who) String() string {
	switch w {
	case Stranger:
		return "caller without a certificate"
	case Local:
		return "local user"
	case Worker:
		return "worker"
	case Manager:
		return "manager"
	case Removed:
		return "removed node"
	}
	return "unknown caller"
}

// Caller is the other end of a connection.
type Caller struct {
	Kind    Who    // one of them
	ID      string // node ID; of a Local caller this node's own, "" while it is in no cluster
	Cluster string
	Addr    netip.Addr // where it calls from; invalid by the unix socket
	// Serial of its certificate: the raft index that it was signed at.
	Serial uint64

	certRole string // what the certificate says
}

// String names a caller in an error.
func (c Caller) String() string {
	if c.Kind == Worker || c.Kind == Manager || c.Kind == Removed {
		return fmt.Sprintf("%s %s", c.Kind, c.ID)
	}
	return c.Kind.String()
}

func kindOf(role string) Who {
	if role == spec.RoleManager {
		return Manager
	}
	return Worker
}

type callerKey struct{}

// WithCaller returns a context that carries who calls.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom tells who calls. Without one in the context it is a Stranger, who
// may do next to nothing.
func CallerFrom(ctx context.Context) Caller {
	if c, ok := ctx.Value(callerKey{}).(Caller); ok {
		return c
	}
	return Caller{Kind: Stranger}
}

// Standing is what a node list says of a node: its role, "" when it is not on
// the list, and the raft index that the list was read at, 0 when there is none
// yet. It is called for each handshake and each call, from any goroutine.
type Standing func(id string) (role string, index uint64)

// judge sets a caller's kind by its certificate and the node list. What both say
// counts, which is the lesser role; a certificate newer than the list counts
// alone.
func (s Standing) judge(c Caller) (Caller, error) {
	if c.Kind == Stranger || c.Kind == Local {
		return c, nil
	}
	c.Kind = kindOf(c.certRole)
	if s == nil {
		return c, nil
	}
	role, index := s(c.ID)
	switch {
	case c.Serial > index: // the list can't know
	case role == "":
		return c, fmt.Errorf("node %s was removed from the cluster", c.ID)
	case role != spec.RoleManager:
		c.Kind = Worker
	}
	return c, nil
}
