package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shoalnet/shoal/dns"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

const dnsPort = 53 // RFC 1035 section 4.2

// Bounds of the steps of a task's life. Each is a bound on waiting for others,
// after which the task goes on without them. takeTimeout and drainTimeout are long:
// to go on before a node's balancer follows is to lose what that node's clients
// send. A node that is declared dead, 2 to 3 s after its last sign of life, and 12 s
// if only its agent is dead, is waited for no more; so what is waited for are nodes
// that live and are slow.
const (
	wireTimeout  = 15 * time.Second       // for its interfaces and routes, when there is a fault
	wireSlowly   = 2 * time.Minute        // when there is none but want of time
	routeTimeout = 300 * time.Millisecond // for the other nodes' routes to it: none sends it traffic before it has one, see hold
	takeTimeout  = 15 * time.Second       // for every node's balancer to choose it, before it is said to run
	leftTimeout  = 2 * time.Second        // the same, once the node has left the cluster and nobody answers it
	drainTimeout = 30 * time.Second       // for every node's balancer to stop choosing it, before it is stopped
	// inFlight is for what a balancer has sent to a replica before it let go of it, and
	// the replica has yet to accept: packets on the way, or in a busy kernel's queues.
	inFlight      = 100 * time.Millisecond
	readyTimeout  = 3 * time.Second       // for its program to listen
	readyFirst    = 2 * time.Millisecond  // between the first two looks at it; doubled from look to look
	readyInterval = 15 * time.Millisecond // and at most
)

// plumbing is what a runner needs of the rest of the agent.
type plumbing interface {
	// publish makes what the runners now say known: to gossip at once, to the
	// View soon. It does not wait.
	publish()
	// wired waits until the task's interfaces and routes are as wanted.
	wired(ctx context.Context, t spec.Task) error
	// blobs are secrets and configs by their IDs, in that order.
	blobs(ctx context.Context, ids []string) ([][]byte, error)
	// templateContext is what the templates of a service's task see.
	templateContext(t spec.Task) (spec.TemplateContext, error)
	// network is what the managers said of a network.
	network(id string) (spec.Network, bool)
	// alone tells that no manager has answered for a while, none knows of this end of a
	// task, and its service would have it replaced; and how long after that end.
	alone(t spec.Task, end spec.TaskStatus) (delay time.Duration, ok bool)
	// served tells whether another replica of a task's service takes connections.
	served(t spec.Task) bool
	// settled waits until this node and every live one has applied what was
	// published before the call.
	settled(ctx context.Context) error
}

// tasks owns the runners of this node, one per task.
type tasks struct {
	rt       runtime.Runtime
	dns      *dns.Server
	instance string
	hostAddr netip.Addr // of this node, for host.shoal.internal
	search   func() []string
	log      *slog.Logger
	plumbing plumbing

	ctx     context.Context    // of the tasks' name servers
	work    context.Context    // of every runner; it ends with ctx, or before it by freeze
	endWork context.CancelFunc // of work
	wg      sync.WaitGroup     // name servers
	busy    sync.WaitGroup     // runners

	mu       sync.Mutex
	runners  map[string]*runner
	adopted  bool
	assigned bool // by the managers, since this agent started
	left     bool // the node is out of the cluster: see stopAll
}

// runner moves one task through its life. Its fields are guarded by tasks.mu.
type runner struct {
	*tasks
	id   string
	wake chan struct{} // size 1: task, or the program's state, changed

	task     spec.Task  // of the run that is made, or was last
	next     *spec.Task // as the managers want it, when that is a further run
	forgoten bool       // the managers have no record of it: stop and remove
	status   spec.TaskStatus
	sandbox  *spec.Sandbox
	ns       string              // the namespace of this run: the task may have another name by now
	endpoint *spec.EndpointState // nil: not announced
	adopting bool                // it has not looked at the program yet
	stopDNS  context.CancelFunc
	asker    atomic.Pointer[dns.Asker]
	detached uint64 // attachments that left up to this version are off the network
	fit      fitness
	heard    bool          // who ran it in the foreground knows of its end, or is gone
	fell     bool          // its program ended by itself, while this agent ran
	pause    time.Duration // before it was last started again

	named *hostsLine // what the task's hosts file says of it; nil: not known. Of run only
}

// hostsLine is what a hosts file says of its task.
type hostsLine struct {
	name  string
	addrs []netip.Addr
}

// attachments are the networks that the task is to be wired to: those it is on,
// and those it is leaving that still drain. tasks.mu is held.
func (r *runner) attachments() []spec.Attachment {
	var out []spec.Attachment
	for _, a := range r.task.Attachments {
		if len(a.Addrs) > 0 && (a.Leaving == 0 || a.Leaving > r.detached) {
			out = append(out, a)
		}
	}
	return out
}

// task data kept by the runtime, for adoption.
func encodeTask(t spec.Task) []byte {
	b, err := json.Marshal(t)
	if err != nil {
		panic(err) // plain values: can't fail
	}
	return b
}

// adopt makes a runner for every task the runtime still has. It is called once,
// before the first assign. Of known tasks what the managers last wanted of them
// counts: what the runtime kept is of their start. But what they are known to have
// wanted of an earlier run does not, as the cache may be older than the start.
func (m *tasks) adopt(ctx context.Context, known []spec.Task) error {
	have, err := m.rt.List(ctx)
	if err != nil {
		return fmt.Errorf("find running tasks: %w", err)
	}
	for _, st := range have {
		var t spec.Task
		if err := json.Unmarshal(st.Data, &t); err != nil || t.ID != st.ID {
			m.log.Error("removing a task whose record can't be read", "task", st.Name, "error", err)
			if err := m.rt.Remove(ctx, st.ID); err != nil {
				return err
			}
			continue
		}
		if i := slices.IndexFunc(known, func(k spec.Task) bool { return k.ID == t.ID && k.Run >= t.Run }); i >= 0 {
			t.Desired, t.Attachments, t.Ports, t.Name, t.Stopping = known[i].Desired, known[i].Attachments, known[i].Ports, known[i].Name, known[i].Stopping
		}
		m.log.Info("adopting task", "task", t.Name, "state", st.State, "pid", st.PID)
		m.start(t, &st)
	}
	m.mu.Lock()
	m.adopted = true
	m.mu.Unlock()
	return nil
}

// assign brings the runners in line with an assignment: new tasks get a runner,
// known ones their new desired state. Only a fresh assignment, one that comes
// from the managers now, may end what it does not name, or an earlier run of it does.
func (m *tasks) assign(self string, assigned []spec.Task, fresh bool) {
	named := map[string]bool{}
	rewired := false
	for _, t := range assigned {
		if t.Node != self {
			continue
		}
		named[t.ID] = true
		m.mu.Lock()
		r := m.runners[t.ID]
		if r != nil && (fresh || t.Run >= r.task.Run) {
			rewired = r.heed(t) || rewired
		}
		m.mu.Unlock()
		if r == nil && !t.Status.Released {
			m.start(t, nil)
		}
	}
	if rewired {
		m.plumbing.publish()
	}
	if !fresh {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.assigned = true
	for id, r := range m.runners {
		if !named[id] && !r.forgoten {
			r.forgoten = true
			r.kick()
		}
	}
}

// heed takes up what the managers want of the task, and tells whether its networks or its
// name are others. tasks.mu is held.
func (r *runner) heed(t spec.Task) bool {
	r.task.Desired, r.task.Status, r.task.Stopping = t.Desired, t.Status, t.Stopping
	if r.next = nil; t.Run > r.task.Run {
		// The run that ends keeps what it has.
		r.next = &t
		r.kick()
		return false
	}
	changed := r.task.Name != t.Name || !reflect.DeepEqual(r.task.Attachments, t.Attachments)
	r.task.Name, r.task.Attachments, r.task.Ports = t.Name, t.Attachments, t.Ports
	r.sees()
	r.kick()
	return changed
}

func (m *tasks) start(t spec.Task, found *runtime.Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.runners[t.ID] != nil || m.work.Err() != nil {
		return
	}
	r := &runner{tasks: m, id: t.ID, wake: make(chan struct{}, 1), task: t, adopting: found != nil}
	r.status.Run = t.Run
	m.runners[t.ID] = r
	m.busy.Go(func() { r.run(m.work, found) })
}

// begin makes the contexts of what the tasks need, which end with ctx.
func (m *tasks) begin(ctx context.Context) {
	m.ctx = ctx
	m.work, m.endWork = context.WithCancel(ctx)
}

// freeze ends the runners, and leaves the tasks as they are.
func (m *tasks) freeze() {
	m.endWork()
	m.busy.Wait()
}

// wait returns when nothing of the tasks is at work here any more, after the end of their
// context.
func (m *tasks) wait() {
	m.freeze()
	m.wg.Wait()
}

// event passes the program's change of state on to its runner.
func (m *tasks) event(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.runners[id]; r != nil {
		r.kick()
	}
}

// stopAll asks every task to stop and waits until they have, for leave. The managers
// have let the node go by then, so the others have dropped its endpoints, and no
// longer hear what it says, nor answer.
func (m *tasks) stopAll(ctx context.Context) error {
	for {
		m.mu.Lock()
		m.left = true
		left := slices.Sorted(maps.Keys(m.runners))
		for _, r := range m.runners {
			r.forgoten = true
			r.kick()
		}
		m.mu.Unlock()
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d tasks did not end: %s", len(left), strings.Join(left, ", "))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// hasAdopted tells that every task of an earlier agent has a runner.
func (m *tasks) hasAdopted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.adopted
}

// sandboxes, endpoints and statuses are what the runners now say; of sandboxes,
// whole tells that none of an earlier agent is missing.
func (m *tasks) sandboxes() (out []spec.Sandbox, whole bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runners {
		if r.sandbox != nil {
			sb := *r.sandbox
			sb.Attachments = r.attachments()
			out = append(out, sb)
		}
	}
	return out, m.isWhole()
}

// whole tells that every task of an earlier agent has said what it is: to
// announce some of them would withdraw the others.
func (m *tasks) whole() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.isWhole()
}

// told tells that the managers have said what is to run here, and that each of it, and
// what an earlier agent left, has said how it is.
func (m *tasks) told() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runners {
		if r.status.At == 0 {
			return false
		}
	}
	return m.adopted && m.assigned
}

// isWhole is whole with tasks.mu held.
func (m *tasks) isWhole() bool {
	for _, r := range m.runners {
		if r.adopting {
			return false
		}
	}
	return m.adopted
}

func (m *tasks) endpoints() []spec.Endpoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []spec.Endpoint
	for _, r := range m.runners {
		if r.endpoint == nil {
			continue
		}
		for _, a := range r.attachments() {
			state := *r.endpoint
			if a.Leaving != 0 {
				state = spec.EndpointDraining
			}
			out = append(out, spec.Endpoint{Task: r.id, TaskName: r.task.Name, Hostname: hostname(r.task),
				Service: r.task.Service, Slot: r.task.Slot, Network: a.Network, Addrs: a.Addrs, Aliases: a.Aliases, State: state})
		}
	}
	slices.SortFunc(out, func(a, b spec.Endpoint) int { return cmp.Compare(a.Key(), b.Key()) })
	return out
}

func (m *tasks) statuses() map[string]spec.TaskStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string]spec.TaskStatus, len(m.runners))
	for id, r := range m.runners {
		out[id] = r.status
	}
	return out
}

// find returns the task of a runner, by ID.
func (m *tasks) find(id string) (spec.Task, spec.TaskStatus, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.runners[id]
	if r == nil {
		return spec.Task{}, spec.TaskStatus{}, false
	}
	return r.task, r.status, true
}

// name is the task's, which may be given another.
func (r *runner) name() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.task.Name
}

func (r *runner) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// set changes what the runner says and publishes it.
func (r *runner) set(fn func()) {
	r.mu.Lock()
	fn()
	r.mu.Unlock()
	r.plumbing.publish()
}

// state records how far the task is.
func (r *runner) state(s spec.TaskState, msg string) {
	r.set(func() {
		r.status.State, r.status.Message, r.status.At = s, msg, time.Now().UnixMilli()
	})
	r.log.Info("task", "task", r.name(), "state", s, "message", msg)
}

func (r *runner) announce(s spec.EndpointState) { r.set(func() { r.endpoint = &s }) }
func (r *runner) withdraw()                     { r.set(func() { r.endpoint = nil }) }

// unwanted tells why the task is to end, "" while it is to run.
func (r *runner) unwanted() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.forgoten:
		return "removed"
	case r.task.Desired != spec.DesiredRunning:
		return "stopped"
	case r.next != nil:
		return "started again"
	}
	return ""
}

// gone tells that nothing is to be kept of the task, its output neither.
func (r *runner) gone() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.forgoten
}

// run is the task's life. When ctx ends it returns and leaves the task as it is,
// for the next agent to adopt.
func (r *runner) run(ctx context.Context, found *runtime.Status) {
	for again := true; again; found = nil {
		err := r.live(ctx, found)
		if ctx.Err() != nil {
			return
		}
		r.set(func() { r.adopting = false })
		again = false
		switch {
		case errors.Is(err, errAgain):
			again = r.anew(ctx, "", 0)
		case err != nil && r.persists():
			again = r.anew(ctx, err.Error(), 0)
		case err != nil:
			r.state(spec.TaskFailed, err.Error())
		}
		if !again {
			r.release(ctx)
			again = r.rest(ctx)
		}
		if ctx.Err() != nil {
			return
		}
	}
	r.linger(ctx)
	if ctx.Err() != nil {
		return
	}
	if !r.insist(ctx, "task can't be removed; trying again", r.rt.Remove) {
		return
	}
	r.mu.Lock()
	delete(r.runners, r.id)
	r.mu.Unlock()
	r.plumbing.publish()
}

// errAgain is the end of a program that is to be started again in its place.
var errAgain = errors.New("it is started again")

// Docker's times between the starts of a program (restartmanager): the first, and the
// most that doubling makes of it; a run that lasts long begins with the first again.
const (
	pauseFirst = 100 * time.Millisecond
	pauseMost  = time.Minute
	longRun    = 10 * time.Second
)

// alonePoll is how often the end of a replica is looked at again while no manager knows.
const alonePoll = 500 * time.Millisecond

// rest keeps a task that has ended until the managers forget it, and with it its output.
// It returns true when the task has to be made anew: nobody else would have it replaced.
func (r *runner) rest(ctx context.Context) bool {
	r.mu.Lock()
	task, end, fell := r.task, r.status, r.fell
	r.mu.Unlock()
	var look <-chan time.Time
	if fell && task.Service != "" {
		t := time.NewTicker(alonePoll)
		defer t.Stop()
		look = t.C
	}
	for !r.gone() {
		if r.takeUp(ctx) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-r.wake:
		case <-look:
			delay, ok := r.plumbing.alone(task, end)
			if r.unwanted() != "" || !ok {
				continue
			}
			r.log.Warn("a replica is started again by its node: no manager answers", "task", task.Name)
			if r.anew(ctx, "", delay) {
				return true
			}
			// It is over, and what was said of its addresses is to be said again.
			look = nil
			r.release(ctx)
		}
	}
	return false
}

// again tells whether a program that ended is started again in its place, by its task's
// own policy.
func (r *runner) again(st runtime.Status) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.task
	return !r.forgoten && t.Desired == spec.DesiredRunning && t.Service == "" && t.Spec.RestartsAfter(st.ExitCode != 0 || st.Err != "", t.Attempt)
}

// persists tells whether a task that has run before, and now can't be made or started,
// is tried again by its own policy. The first time whoever wants it is told.
func (r *runner) persists() bool {
	r.mu.Lock()
	attempt := r.task.Attempt
	r.mu.Unlock()
	return attempt > 0 && r.again(runtime.Status{Err: "it can't be started"})
}

// anew takes down what is left of a task's run, and waits until it is time for the next:
// a delay after its end, or 0: Docker's. It is false if none is wanted any more, or ctx has
// ended. why is what became of that run; "": its program ended.
func (r *runner) anew(ctx context.Context, why string, delay time.Duration) bool {
	var st runtime.Status
	if why == "" {
		var err error
		if st, err = r.programState(ctx); err != nil {
			return false
		}
		why = cmp.Or(st.Err, fmt.Sprintf("exit status %d", st.ExitCode))
	}
	if st.Ran() >= longRun {
		r.pause = 0
	}
	r.pause = min(max(2*r.pause, pauseFirst), pauseMost)
	pause := r.pause
	if delay > 0 { // of which some may have gone by
		if pause = delay; !st.ExitedAt.IsZero() {
			pause = min(max(0, delay-time.Since(st.ExitedAt)), delay)
		}
	}
	r.set(func() {
		r.task.Attempt++
		r.task.Spec.Attach = false // nobody waits for its first words
		r.status.ExitCode, r.status.PID, r.status.Released = st.ExitCode, 0, false
		r.fell, r.fit, r.named = false, fitness{}, nil
	})
	r.state(spec.TaskPreparing, fmt.Sprintf("%s; restart %d in %s", why, r.task.Attempt, pause.Round(time.Millisecond)))
	r.takeDown(ctx)
	for {
		err := r.rt.Renew(ctx, r.id)
		if err != nil && ctx.Err() == nil && !r.persists() {
			r.state(spec.TaskFailed, err.Error())
			return false
		}
		r.waitWanted(ctx, pause)
		if ctx.Err() != nil {
			return false
		}
		if why := r.unwanted(); why != "" {
			r.state(spec.TaskShutdown, why+" before it started again")
			return false
		}
		if err == nil {
			return true
		}
		r.pause = min(2*r.pause, pauseMost)
		pause = r.pause
		r.state(spec.TaskPreparing, fmt.Sprintf("%v; tried again in %s", err, pause))
	}
}

// waitWanted waits for d, or until the task is unwanted or ctx ends, whatever has become of
// its program.
func (r *runner) waitWanted(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	woken := false
	for over := false; !over && r.unwanted() == ""; {
		select {
		case <-ctx.Done():
			over = true
		case <-t.C:
			over = true
		case <-r.wake:
			woken = true
		}
	}
	if woken {
		r.kick() // for what comes after
	}
}

// takeUp goes on to the run of an ended task that was asked for; false if there is none,
// or it can't be made.
func (r *runner) takeUp(ctx context.Context) bool {
	r.mu.Lock()
	next := r.next
	r.mu.Unlock()
	if next == nil || ctx.Err() != nil {
		return false
	}
	err := r.rt.Renew(ctx, r.id)
	if ctx.Err() != nil {
		return false
	}
	r.set(func() {
		// What its image says of it stays: it is what the spec was filled in with.
		r.task.Run, r.task.Attempt, r.task.Spec.Attach = next.Run, 0, next.Spec.Attach
		r.task.Name, r.task.Attachments, r.task.Ports, r.task.Status = next.Name, next.Attachments, next.Ports, next.Status
		if r.next != nil && r.next.Run <= next.Run {
			r.next = nil
		}
		r.status = spec.TaskStatus{State: spec.TaskPreparing, Run: next.Run, At: time.Now().UnixMilli(), Wired: r.status.Wired}
		r.pause, r.fell, r.heard, r.fit = 0, false, false, fitness{}
	})
	r.named = nil
	if err != nil {
		r.state(spec.TaskFailed, err.Error())
		r.release(ctx)
		return false
	}
	return true
}

// lingerTime is how long the end of a task that somebody ran in the foreground, and
// that is forgotten by itself, waits for him: his session was cut as an agent ended.
const (
	lingerTime = 10 * time.Second
	lingerPoll = 50 * time.Millisecond
)

// linger waits for who is to hear of the task's end. The time is counted as it is
// waited: an agent that stood still heard nobody meanwhile.
func (r *runner) linger(ctx context.Context) {
	for waited := time.Duration(0); waited < lingerTime; waited += lingerPoll {
		r.mu.Lock()
		over := r.heard || r.left || !r.task.Spec.Attach || !r.task.Spec.AutoRemove || r.status.At == 0
		r.mu.Unlock()
		if over || !sleep.For(ctx, lingerPoll) {
			return
		}
	}
}

// hear notes that who ran a task in the foreground knows of its end.
func (m *tasks) hear(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.runners[id]; r != nil {
		r.heard = true
	}
}

// live runs the task until its program has ended and its final state is set;
// an error means that it could not be run.
func (r *runner) live(ctx context.Context, found *runtime.Status) error {
	r.mu.Lock()
	t := r.task
	r.mu.Unlock()
	running := found != nil && found.State == runtime.Running
	if s := t.Status.State; found == nil && s.Ended() && s != spec.TaskLost && t.Status.Run == t.Run {
		// It has run, and the runtime has lost it with its sandbox: the machine
		// was started anew before the release was told.
		r.set(func() { r.status = t.Status })
		return nil
	}
	if found == nil || found.State == runtime.Created {
		if why := r.unwanted(); why != "" {
			r.state(spec.TaskShutdown, why+" before it started")
			return nil
		}
		r.state(spec.TaskPreparing, "")
	}
	if found != nil && found.State == runtime.Exited {
		if r.again(*found) {
			return errAgain
		}
		r.ended(*found)
		return nil
	}

	if found == nil && t.Service != "" && t.Spec.HasTemplates() {
		c, err := r.plumbing.templateContext(t)
		if err != nil {
			return err
		}
		if t.Spec, err = t.Spec.Expand(c); err != nil {
			return err
		}
		r.mu.Lock()
		r.task.Spec = t.Spec
		r.mu.Unlock()
	}
	sb := spec.Sandbox{Task: t.ID, Name: t.Name}
	if found != nil {
		sb.Netns, sb.DNSPort = found.Sandbox.Netns, found.Sandbox.DNSPort
	} else {
		rt := runtime.Task{ID: t.ID, Name: t.Name, Netns: r.netns(t), Spec: t.Spec, Executor: runtime.ExecutorOf(t.Spec), Hostname: hostname(t),
			Keep: t.Service == "" && !t.Spec.AutoRemove}
		err := r.prepare(ctx, &rt)
		if err == nil {
			// What its image says is the task's from now on.
			t.Spec = rt.Spec
			r.set(func() { r.task.Spec = rt.Spec })
			rt.Files, err = r.files(ctx, t)
		}
		if err != nil {
			if r.unwanted() != "" && ctx.Err() == nil {
				r.state(spec.TaskShutdown, r.unwanted()+" before it started")
				return nil
			}
			return err
		}
		rt.ResolvConf, rt.Hosts, rt.Data = resolvConf(t.Spec, r.search()), hosts(t, r.hostAddr), encodeTask(t)
		made, err := r.rt.Create(ctx, rt)
		if err != nil {
			return err
		}
		sb.Netns, sb.DNSPort = made.Netns, made.DNSPort
	}
	r.mu.Lock()
	r.ns = sb.Netns
	r.mu.Unlock()
	if sb.Netns != "" {
		if err := r.serveDNS(ctx); err != nil {
			return err
		}
	}
	fit := r.firstFitness(ctx, t, sb.Netns != "", running)
	first := spec.EndpointStarting
	if running {
		switch {
		case r.unwanted() != "" || fit.ill != "" || fit.deaf != "":
			first = spec.EndpointDraining
		case !fit.quiet:
			first = spec.EndpointActive
		case fit.idle:
			first = spec.EndpointIdle
		}
	}
	r.set(func() {
		r.adopting, r.fit = false, fit
		if r.endpoint = &first; sb.Netns != "" {
			r.sandbox = &sb
		}
	})

	if !running {
		err := r.whileWanted(ctx, wireSlowly, func(ctx context.Context) error { return r.plumbing.wired(ctx, t) })
		if err != nil && r.unwanted() == "" {
			return err
		}
		err = r.whileWanted(ctx, routeTimeout, r.plumbing.settled)
		if err != nil {
			r.log.Debug("starting before every node has a route to the task", "task", t.Name, "missing", err)
		}
		if wait := time.Until(time.UnixMilli(t.NotBefore)); t.NotBefore > 0 && wait > 0 && r.unwanted() == "" {
			r.state(spec.TaskPreparing, fmt.Sprintf("waiting %s before it starts again", wait.Round(time.Millisecond)))
			r.waitUnless(ctx, wait)
		}
		if ctx.Err() != nil {
			return nil
		}
		if why := r.unwanted(); why != "" {
			r.state(spec.TaskShutdown, why+" before it started")
			return nil
		}
		r.state(spec.TaskStarting, "")
		if err := r.rt.Start(ctx, t.ID); err != nil {
			if st, serr := r.programState(ctx); serr == nil && st.State == runtime.Exited {
				r.set(func() { r.status.ExitCode = st.ExitCode })
			}
			return err
		}
	}
	return r.watch(ctx)
}

// errNotGiven is that managers will not give a node a secret or config.
var errNotGiven = errors.New("not given to this node")

// files are the contents of a task's secrets and configs. It waits for a manager to
// answer, as long as the task is wanted.
func (r *runner) files(ctx context.Context, t spec.Task) (files [][]byte, err error) {
	var ids []string
	for _, ref := range append(slices.Clone(t.Spec.Secrets), t.Spec.Configs...) {
		ids = append(ids, ref.ID)
	}
	if len(ids) == 0 {
		return nil, nil
	}
	said := false
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		files, err = r.plumbing.blobs(ctx, ids)
		if err == nil || errors.Is(err, errNotGiven) {
			return files, err
		}
		if !said && wait > 500*time.Millisecond {
			r.state(spec.TaskPreparing, "waiting for a manager to give its secrets and configs: "+err.Error())
			said = true
		}
		r.waitUnless(ctx, wait)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if why := r.unwanted(); why != "" {
			return nil, errors.New(why)
		}
	}
}

// prepare fetches what the task needs, its image, for as long as it is wanted.
func (r *runner) prepare(ctx context.Context, t *runtime.Task) error {
	if t.Executor == "" {
		return nil
	}
	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	progress := make(chan string, 1)
	type result struct {
		spec spec.TaskSpec
		err  error
	}
	done := make(chan result, 1)
	go func() { // ends with pctx
		s, err := r.rt.Prepare(pctx, *t, func(s string) {
			select {
			case <-progress:
			default:
			}
			select {
			case progress <- s:
			default:
			}
		})
		done <- result{s, err}
	}()
	var told time.Time
	said := ""
	for {
		select {
		case res := <-done:
			t.Spec = res.spec
			return res.err
		case <-r.wake:
			if r.unwanted() != "" {
				cancel()
			}
		case s := <-progress:
			// Each word of it goes through raft.
			if s != said && time.Since(told) >= progressEvery {
				r.state(spec.TaskPreparing, s)
				said, told = s, time.Now()
			}
		}
	}
}

// progressEvery is how often the managers are told of a pull's progress.
const progressEvery = 2 * time.Second

// waitUnless waits for d, or until the task is unwanted or ctx ends.
func (r *runner) waitUnless(ctx context.Context, d time.Duration) {
	_ = r.whileWanted(ctx, d, func(ctx context.Context) error {
		<-ctx.Done()
		return nil
	})
}

// whileWanted runs fn for d at most, and breaks it off as soon as the task is
// unwanted or its program has ended.
func (r *runner) whileWanted(ctx context.Context, d time.Duration, fn func(context.Context) error) error {
	return r.during(ctx, d, func() bool { return r.unwanted() == "" }, fn)
}

// whileRuns runs fn for d at most, and breaks it off as soon as the task's program
// has ended.
func (r *runner) whileRuns(ctx context.Context, d time.Duration, fn func(context.Context) error) error {
	return r.during(ctx, d, func() bool { return true }, fn)
}

// during runs fn for d at most, and breaks it off as soon as on is false or the
// task's program has ended.
func (r *runner) during(ctx context.Context, d time.Duration, on func() bool, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }() // ends with ctx; waited for below
	woken := false
	for {
		if st, err := r.programState(ctx); !on() || err == nil && st.State == runtime.Exited {
			cancel()
		}
		select {
		case err := <-done:
			if woken {
				r.kick() // for what comes after
			}
			return err
		case <-r.wake:
			woken = true
		}
	}
}

func (r *runner) programState(ctx context.Context) (runtime.Status, error) {
	return r.rt.Status(ctx, r.id)
}

// watch waits for the program's end, and stops it when it is unwanted.
func (r *runner) watch(ctx context.Context) error {
	lctx, cancel := context.WithCancel(ctx)
	looked := make(chan struct{})
	go func() {
		defer close(looked)
		r.lookAfter(lctx)
	}()
	defer func() {
		cancel()
		<-looked
	}()
	for {
		st, err := r.programState(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if st.State == runtime.Exited {
			r.withdraw()
			if r.again(st) {
				return errAgain
			}
			r.set(func() { r.fell = true })
			r.ended(st)
			return nil
		}
		if r.unwanted() != "" {
			return r.stop(ctx, spec.TaskShutdown, "")
		}
		r.mu.Lock()
		dead := r.fit.dead
		if dead != "" { // what of it is told from here on has it
			r.status.Health = r.fit.health(r.task)
		}
		r.mu.Unlock()
		if dead != "" {
			return r.stop(ctx, spec.TaskFailed, dead)
		}
		if !r.detach(ctx) || !r.rewire(ctx) {
			continue
		}
		r.tell(ctx, st)
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		}
	}
}

// detachRetry is the wait between tries to take a task off a network.
const detachRetry = time.Second

// detach takes the task off the networks that it is leaving, while it runs: no
// new connections first, then the interface, which is rewire's part. It returns
// false when that came to nothing because the task is to end, or ctx did.
func (r *runner) detach(ctx context.Context) bool {
	r.mu.Lock()
	leaving := uint64(0)
	for _, a := range r.task.Attachments {
		leaving = max(leaving, a.Leaving)
	}
	done := leaving <= r.detached
	r.mu.Unlock()
	if done {
		return true
	}
	r.plumbing.publish()
	err := r.whileWanted(ctx, drainTimeout, r.plumbing.settled)
	if ctx.Err() != nil || r.unwanted() != "" {
		return false
	}
	if err != nil {
		r.log.Warn("disconnecting a task that not every node is known to have drained", "task", r.name(), "error", err)
	}
	r.mu.Lock()
	var addrs []netip.Addr
	for _, a := range r.task.Attachments {
		if a.Leaving > r.detached && a.Leaving <= leaving {
			addrs = append(addrs, a.Addrs...)
		}
	}
	r.mu.Unlock()
	// Who is connected over it would wait for hours, on either side.
	if err := r.rt.Reset(ctx, r.id, addrs); errors.Is(err, errors.ErrUnsupported) {
		r.log.Warn("connections over a network that a task leaves are not reset, and hang until their own end", "task", r.name(), "error", err)
	} else if err != nil && !errors.Is(err, runtime.ErrNotFound) {
		r.log.Error("connections over a network that a task leaves can't be reset", "task", r.name(), "error", err)
	}
	r.set(func() { r.detached = leaving })
	return true
}

// rewire waits until a running task's interfaces are as its networks, which come
// and go, want them, and tells the managers: they free the addresses of those
// that it left, and who connected it to another may use that. It returns false
// when that came to nothing because the task is to end, or has ended, or is to
// leave another, or ctx ended.
func (r *runner) rewire(ctx context.Context) bool {
	for {
		r.mu.Lock()
		t, told, target := r.task, r.status.Wired, r.detached
		var on []netip.Addr
		for _, a := range t.Attachments {
			if a.Leaving > r.detached {
				r.mu.Unlock()
				return false
			}
			if a.Leaving == 0 {
				target = max(target, a.Joined)
				on = append(on, a.Addrs...)
			}
		}
		joins, netns := target > r.detached, r.sandbox != nil
		r.mu.Unlock()
		// The task's own name stands for the addresses that it has now, and for
		// what the user wants it to.
		for _, h := range t.Spec.ExtraHosts {
			if name, addr, err := spec.ParseExtraHost(h); err == nil && name == hostname(t) {
				if !addr.IsValid() {
					addr = r.hostAddr
				}
				on = append(on, addr)
			}
		}
		if name := hostname(t); netns && (r.named == nil || r.named.name != name || !slices.Equal(r.named.addrs, on)) {
			if err := r.rt.SetHosts(ctx, r.id, name, on); err != nil {
				r.log.Error("the hosts file of a task can't be changed", "task", t.Name, "error", err)
			}
			r.named = &hostsLine{name, on}
		}
		if told >= target {
			return true
		}
		err := r.whileWanted(ctx, wireSlowly, func(ctx context.Context) error { return r.plumbing.wired(ctx, t) })
		if err == nil && joins {
			// Whoever connected it expects it to be found.
			if err := r.whileWanted(ctx, routeTimeout, r.plumbing.settled); err != nil {
				r.log.Debug("connected before every node has a route to the task", "task", t.Name, "missing", err)
			}
		}
		if err == nil {
			r.set(func() { r.status.Wired = max(r.status.Wired, target) })
			continue // there may be more by now
		}
		st, serr := r.programState(ctx)
		if ctx.Err() != nil || r.unwanted() != "" || serr != nil || st.State != runtime.Running {
			return false
		}
		r.log.Error("the task's networks can't be changed; trying again", "task", t.Name, "error", err)
		r.waitUnless(ctx, detachRetry)
	}
}

// netns is the name of the task's namespace; empty for one on the network host.
func (r *runner) netns(t spec.Task) string {
	for _, a := range t.Attachments {
		if n, ok := r.plumbing.network(a.Network); ok && n.Driver == spec.DriverHost {
			return ""
		}
	}
	return spec.TaskNetns(r.instance, t)
}

// serves tells whether it is a replica that the balancers choose. tasks.mu is held.
func (r *runner) serves() bool {
	return r.task.Service != "" && r.endpoint != nil && *r.endpoint == spec.EndpointActive
}

// stop ends the task in good order: it is out of every balancer before its
// program hears of it. as and why are what it is then said to be.
func (r *runner) stop(ctx context.Context, as spec.TaskState, why string) error {
	r.mu.Lock()
	served := r.serves()
	r.mu.Unlock()
	r.announce(spec.EndpointDraining)
	r.state(spec.TaskStopping, "draining")
	r.mu.Lock()
	bound := drainTimeout
	if r.left {
		bound = leftTimeout
	}
	r.mu.Unlock()
	err := r.whileRuns(ctx, bound, r.plumbing.settled)
	if err == nil && served {
		_ = r.whileRuns(ctx, 2*inFlight, func(ctx context.Context) error {
			sleep.For(ctx, inFlight)
			return nil
		})
	}
	if st, serr := r.programState(ctx); err != nil && ctx.Err() == nil && (serr != nil || st.State == runtime.Running) {
		r.log.Warn("stopping a task that not every node is known to have drained", "task", r.name(), "error", err)
	}
	r.state(spec.TaskStopping, "")
	r.mu.Lock()
	signal, grace := r.task.StopWith()
	r.mu.Unlock()
	if err := r.rt.Stop(ctx, r.id, signal, grace); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		r.withdraw()
		return err
	}
	st, err := r.programState(ctx)
	if ctx.Err() != nil {
		return nil
	}
	r.withdraw()
	if err != nil {
		return err
	}
	r.set(func() { r.status.ExitCode = st.ExitCode })
	r.state(as, why)
	return nil
}

// ended sets the final state of a program that ended by itself.
func (r *runner) ended(st runtime.Status) {
	s, msg := spec.TaskFailed, st.Err
	if st.ExitCode == 0 && st.Err == "" {
		s = spec.TaskComplete
	} else if msg == "" {
		msg = fmt.Sprintf("exit status %d", st.ExitCode)
	}
	if r.unwanted() != "" {
		s, msg = spec.TaskShutdown, ""
	}
	r.set(func() { r.status.ExitCode, r.status.PID = st.ExitCode, 0 })
	r.state(s, msg)
}

// release takes the task off the network and tells the managers that its
// addresses are free.
func (r *runner) release(ctx context.Context) {
	r.takeDown(ctx)
	if ctx.Err() != nil {
		return
	}
	r.set(func() {
		r.status.Released, r.status.PID = true, 0
		r.status.At = time.Now().UnixMilli()
	})
}

// takeDown takes the task off the network and removes its sandbox.
func (r *runner) takeDown(ctx context.Context) {
	r.set(func() { r.sandbox, r.endpoint = nil, nil })
	if r.stopDNS != nil {
		r.stopDNS()
	}
	r.insist(ctx, "the task's sandbox can't be removed; trying again", r.rt.Release)
}

// insist calls fn with the task until it succeeds, and says what of each failure; false: ctx
// ended first.
func (r *runner) insist(ctx context.Context, what string, fn func(context.Context, string) error) bool {
	for {
		err := fn(ctx, r.id)
		if err == nil {
			return true
		}
		level := slog.LevelError
		if errors.Is(err, runtime.ErrUnavailable) {
			level = slog.LevelWarn // doctor says so, if it stays away
		}
		r.log.Log(ctx, level, what, "task", r.name(), "error", err)
		if !sleep.For(ctx, time.Second) {
			return false
		}
	}
}

// serveDNS answers at 127.0.0.11 of the task's namespace until the task is
// released.
func (r *runner) serveDNS(ctx context.Context) error {
	pc, ln, err := r.rt.DNSSockets(ctx, r.id)
	if err != nil {
		return fmt.Errorf("name server of task %s: %w", r.name(), err)
	}
	r.mu.Lock()
	r.sees()
	r.mu.Unlock()
	dctx, cancel := context.WithCancel(r.ctx)
	r.stopDNS = cancel
	r.wg.Go(func() {
		defer cancel()
		if err := r.dns.Serve(dctx, r.asker.Load, pc, ln); err != nil && dctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
			r.log.Error("name server of a task ended", "task", r.name(), "error", err)
		}
	})
	return nil
}

// sees sets what the task may ask for, from its attachments. tasks.mu is held.
func (r *runner) sees() {
	t := r.task
	a := &dns.Asker{Task: t.ID, Host: r.hostAddr, Netns: r.ns, NDots: ndots(t.Spec.DNSOptions), NoForward: true}
	for _, at := range t.Attachments {
		if at.Leaving != 0 {
			continue
		}
		a.Networks = append(a.Networks, at.Network)
		// A network that is not known yet has no names either: the next
		// assignment brings both.
		if n, ok := r.plumbing.network(at.Network); ok && n.Wired() && !n.Internal {
			a.NoForward = false
		}
	}
	for _, s := range t.Spec.DNS {
		a.Upstreams = append(a.Upstreams, netip.AddrPortFrom(s, dnsPort))
	}
	for _, l := range t.Spec.Links {
		if target, alias := spec.ParseLink(l); !strings.EqualFold(target, alias) {
			if a.Links == nil {
				a.Links = map[string]string{}
			}
			a.Links[strings.ToLower(alias)] = target
		}
	}
	r.asker.Store(a)
}

// ndots tells whether the resolver options (resolv.conf(5)) ask for names with
// few dots in the search domains first.
func ndots(options []string) bool {
	for _, o := range options {
		if v, ok := strings.CutPrefix(o, "ndots:"); ok && v != "0" {
			return true
		}
	}
	return false
}

// hostname of a task: what was asked for, else its name in letters that a host
// name may have. A task's name is unique, so its host name is, too.
func hostname(t spec.Task) string {
	if t.Spec.Hostname != "" {
		return t.Spec.Hostname
	}
	h := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, t.Name)
	if len(h) > 63 {
		// The end of a replica's name is what makes it unique.
		h = strings.TrimLeft(h[len(h)-63:], "-")
	}
	return h
}

// resolvConf points the task at its name server. ndots:0, as Docker has it,
// asks for a name as it is before any search domain. Search domains are the
// node's unless the task has its own.
func resolvConf(t spec.TaskSpec, search []string) []byte {
	if len(t.DNSSearch) > 0 {
		search = slices.DeleteFunc(slices.Clone(t.DNSSearch), func(d string) bool { return d == "." })
	}
	options := slices.Clone(t.DNSOptions)
	if !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
		options = append(options, "ndots:0")
	}
	var b strings.Builder
	b.WriteString("# made by shoal: names of the task's networks, then the node's own resolvers\n")
	if len(search) > 0 {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	b.WriteString("nameserver 127.0.0.11\noptions " + strings.Join(options, " ") + "\n")
	return []byte(b.String())
}

// hosts names the task itself, as Docker's /etc/hosts does, then its node and
// what the user added.
func hosts(t spec.Task, node netip.Addr) []byte {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	if node.IsValid() {
		fmt.Fprintf(&b, "%s\t%s\n", node, spec.HostName)
	}
	for _, h := range t.Spec.ExtraHosts {
		name, addr, err := spec.ParseExtraHost(h)
		if err != nil {
			continue // validated when the task was made
		}
		if !addr.IsValid() {
			addr = node
		}
		if !addr.IsValid() {
			continue
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr, name)
	}
	for _, a := range t.Attachments {
		for _, ip := range a.Addrs {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname(t))
		}
	}
	return []byte(b.String())
}
