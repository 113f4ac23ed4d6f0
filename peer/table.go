package peer

import "strings"

// Rule is what is let in at a path.
type Rule struct {
	Who Who
	// Own: the call names a node, which must be the caller itself. Who serves it
	// looks, by [Owner].
	Own bool
	// Body bounds the request's body, in bytes; 0: its messages are bounded by
	// who reads them, as there is no end to a stream.
	Body int64
}

// maxBody is for a call with one message: a command of the managers at most.
const maxBody = 4<<20 + 4096

func users() Rule  { return Rule{Who: Users, Body: maxBody} }
func own() Rule    { return Rule{Who: Nodes, Own: true, Body: maxBody} }
func onNode() Rule { return Rule{Who: Users, Body: maxBody} }

// Table says who may call what. What is not in it nobody may: a test holds it
// against the .proto.
//
// A worker may do its own things only: it is the node that is easiest to take,
// and what it may, its thief may. So users' commands are for managers, as they
// are with Docker, and reach the tasks of a worker by way of one.
var Table = map[string]Rule{
	"/shoal.v1.Control/CreateNetwork":     users(),
	"/shoal.v1.Control/ListNetworks":      users(),
	"/shoal.v1.Control/RemoveNetwork":     users(),
	"/shoal.v1.Control/ConnectNetwork":    users(),
	"/shoal.v1.Control/DisconnectNetwork": users(),
	"/shoal.v1.Control/CreateService":     users(),
	"/shoal.v1.Control/UpdateService":     users(),
	"/shoal.v1.Control/ListServices":      users(),
	"/shoal.v1.Control/RemoveService":     users(),
	"/shoal.v1.Control/CreateTask":        users(),
	"/shoal.v1.Control/ListTasks":         users(),
	"/shoal.v1.Control/StopTask":          users(),
	"/shoal.v1.Control/StartTask":         users(),
	"/shoal.v1.Control/RenameTask":        users(),
	"/shoal.v1.Control/CreateBlob":        users(),
	"/shoal.v1.Control/UpdateBlob":        users(),
	"/shoal.v1.Control/ListBlobs":         users(),
	"/shoal.v1.Control/RemoveBlob":        users(),
	"/shoal.v1.Control/UpdateNode":        users(),
	"/shoal.v1.Control/RemoveNode":        users(),
	"/shoal.v1.Control/Events":            users(),
	"/shoal.v1.Control/Watch":             users(),
	"/shoal.v1.Control/ShowToken":         users(),
	"/shoal.v1.Control/RotateToken":       users(),
	"/shoal.v1.Control/ShowCA":            users(),
	"/shoal.v1.Control/RotateCA":          users(),
	"/shoal.v1.Control/UnlockKey":         users(),
	"/shoal.v1.Control/SaveSnapshot":      users(),
	// Every node has the list of nodes in its assignment.
	"/shoal.v1.Control/ListNodes": {Who: Nodes, Body: maxBody},

	// A manager calls it on behalf of a stranger that asked it and not the leader.
	"/shoal.v1.Control/JoinNode": {Who: Stranger | Manager, Body: 64 << 10},

	"/shoal.v1.Control/RenewCertificate": own(),
	"/shoal.v1.Control/AdmitManager":     {Who: Manager | Local, Body: maxBody}, // of itself
	"/shoal.v1.Control/LeaveNode":        own(),
	"/shoal.v1.Control/Assignments":      own(),
	"/shoal.v1.Control/TaskBlobs":        own(),
	"/shoal.v1.Control/Report":           own(),
	"/shoal.v1.Control/CheckEndpoints":   own(),
	LeaderPath:                           {Who: Nodes, Body: 1},

	"/shoal.v1.Node/Exec":         {Who: Users},
	"/shoal.v1.Node/Copy":         {Who: Users},
	"/shoal.v1.Node/ImageList":    {Who: Users},
	"/shoal.v1.Node/ImagePull":    {Who: Users},
	"/shoal.v1.Node/ImageResolve": {Who: Users},
	"/shoal.v1.Node/ImageRemove":  {Who: Users},
	"/shoal.v1.Node/ImagePrune":   {Who: Users},
	"/shoal.v1.Node/ImageInspect": {Who: Users},
	"/shoal.v1.Node/ImageLoad":    {Who: Users},
	"/shoal.v1.Node/ImageSave":    {Who: Users},
	"/shoal.v1.Node/VolumeList":   {Who: Users},
	"/shoal.v1.Node/VolumeCreate": {Who: Users},
	"/shoal.v1.Node/VolumeRemove": {Who: Users},
	"/shoal.v1.Node/Logs":         onNode(),
	"/shoal.v1.Node/Wait":         onNode(),
	"/shoal.v1.Node/Kill":         onNode(),
	"/shoal.v1.Node/Top":          onNode(),
	"/shoal.v1.Node/Tasks":        onNode(),
	"/shoal.v1.Node/Stats":        onNode(),
	"/shoal.v1.Node/Kernel":       onNode(),

	"/shoal.v1.Local/Info":   {Who: Local, Body: maxBody},
	"/shoal.v1.Local/Init":   {Who: Local, Body: maxBody},
	"/shoal.v1.Local/Join":   {Who: Local, Body: maxBody},
	"/shoal.v1.Local/Leave":  {Who: Local, Body: maxBody},
	"/shoal.v1.Local/Doctor": {Who: Local, Body: maxBody},
	"/shoal.v1.Local/Unlock": {Who: Local, Body: maxBody},

	"/shoal.v1.Local/RestoreSnapshot": {Who: Local, Body: 1 << 30},
}

// LeaderPath answers with the leader's control address as a node knows it.
const LeaderPath = "/shoal.v1.Control/leader"

// HealthPath begins what outer load balancers ask, who have no certificate: only
// whether this node takes connections of a published port, which they could see
// at the port itself.
const HealthPath = "/health/"

// MetricsPath is where Prometheus' metrics are on the agent's unix socket.
const MetricsPath = "/metrics"

// trees are paths that are no RPCs, with all below them.
var trees = map[string]Rule{
	HealthPath: {Who: Anyone, Body: 1},
	// Go's profiles: who may use the socket may see where the time goes.
	"/debug/pprof/": {Who: Local, Body: 1},
	MetricsPath:     {Who: Local, Body: 1},
}

func ruleOf(path string) (Rule, bool) {
	for p, r := range trees {
		if strings.HasPrefix(path, p) {
			return r, true
		}
	}
	r, ok := Table[path]
	return r, ok
}

// Allowed tells whether who may call what is at a path.
func Allowed(path string, who Who) bool {
	r, ok := ruleOf(path)
	return ok && r.Who&who != 0
}
