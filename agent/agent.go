package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/cgroup"
	"github.com/shoalnet/shoal/runtime/volume"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// Default ports. 2377 and 7946 are Docker Swarm's (its users' firewalls know
// them), 4789 is VXLAN's (RFC 7348, section 5).
const (
	DefaultControlPort  = 2377
	DefaultGossipPort   = 7946
	DefaultDataPathPort = 4789
)

// Defaults of address allocation, Docker Swarm's own.
const (
	DefaultPool       = "10.0.0.0/8"
	DefaultSubnetSize = 24
)

// maxStale is the longest that anything is kept in DNS (RFC 8767 section 4: a
// TTL is 7 days at most).
const maxStale = 7 * 24 * time.Hour

// Config is what an agent is given: its place on the machine, and the
// implementations that touch the machine, which only cmd/shoal knows.
type Config struct {
	NodeName    string // empty: the machine's host name
	DataDir     string // survives a reboot
	Socket      string // the API's unix socket
	Instance    string // see spec.View.Instance
	ControlPort int
	GossipPort  int
	// AdvertiseAddr is used by init and join that name none: an address or an
	// interface; empty: the address of the default route.
	AdvertiseAddr string
	// Labels are what constraints may ask for as engine.labels.KEY.
	Labels  map[string]string
	Version string
	// SocketGroup may use the Socket beside root, if there is a group of that name.
	SocketGroup string
	// Ready is called once the Socket answers; nil: nobody waits for it.
	Ready func()
	// GoesDown tells, when Run is to end, whether it is because the machine goes down:
	// its tasks are stopped then, which go on otherwise; nil: it never does.
	GoesDown func() bool
	// MetricsAddr is ADDRESS:PORT to serve Prometheus' metrics at, for anybody who
	// reaches it; empty: they are on the Socket only.
	MetricsAddr string

	Runtime runtime.Runtime
	// Images are the node's; nil: it runs programs of its own file system only.
	Images runtime.Images
	// Volumes are the node's.
	Volumes *volume.Store
	// ImageTTL is how long an image that only tasks asked for stays after the last
	// of them; 0: for ever.
	ImageTTL time.Duration
	Overlay  overlay.Dataplane
	VIP      vip.Dataplane
	Ingress  ingress.Dataplane // nil: no published ports
	// VIPReason says why VIP was chosen.
	VIPReason string
	// OpenProber opens a socket in the named namespace, by which other nodes are
	// probed over the data path; nil: they are not.
	OpenProber func(netns string) (Prober, error)
	// UnderlayMTU is the MTU of the link that has this node's address, in bytes, 0
	// if none has it; nil: the others are not told.
	UnderlayMTU func() int
	// WatchKernel calls wake after changes of the kernel's that may concern
	// us, with where they were; nil: the loops' period must do.
	WatchKernel func(ctx context.Context, wake func([]overlay.Change))
	// Blocked tells of firewalls of the machine that probably drop what Shoal
	// needs; nil: not known.
	Blocked func(ctx context.Context) ([]string, error)
	// Drops reads what the rules of the data path have dropped, for doctor and for
	// metrics; nil: not known.
	Drops func(ctx context.Context) ([]overlay.Drop, error)
	// Cleanup removes every kernel object of this instance.
	Cleanup func() error
	// HostRoutes are prefixes the machine reaches elsewhere.
	HostRoutes func() []netip.Prefix
	// Upstreams are the resolvers of the machine, SearchDomains its domains.
	Upstreams     func() []netip.AddrPort
	SearchDomains func() []string
	// DNSStale is for how long after its end an answer of a resolver may be
	// given when none answers; 0: never.
	DNSStale time.Duration
	// Dial opens the sockets by which resolvers are asked; see [dns.Config].
	Dial func(ctx context.Context, netns, network string, to netip.AddrPort) (net.Conn, error)

	Log *slog.Logger
}

// Agent is one node's process. Make it with New, run it with Run.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	lock    *dirLock
	evict   chan string
	metrics *metrics

	mu      sync.Mutex   // held over init, join and leave
	memberR sync.RWMutex // guards what follows, which only the holder of mu changes
	member  *member      // nil: in no cluster
	ident   *identity
	unfit   error // why there is no member though ident names a cluster
}

// Validate reports the first thing that is wrong with what a user may set, in
// the words of the agent's flags.
func (c Config) Validate() error {
	if c.NodeName != "" {
		if err := spec.ValidateName("node", c.NodeName); err != nil {
			return err
		}
	}
	// It becomes part of file names below spec.NetnsDir.
	if err := spec.ValidateName("instance", c.Instance); err != nil {
		return err
	}
	for _, p := range []struct {
		flag string
		port int
	}{{"--control-port", c.ControlPort}, {"--gossip-port", c.GossipPort}} {
		if p.port < 1 || p.port > 65535 {
			return fmt.Errorf("%s %d is out of range: use 1 to 65535", p.flag, p.port)
		}
	}
	if c.ControlPort == c.GossipPort {
		return fmt.Errorf("--control-port and --gossip-port are both %d: both are TCP, use different ones", c.ControlPort)
	}
	if err := c.validateMetricsAddr(); err != nil {
		return err
	}
	if c.DNSStale < 0 || c.DNSStale > maxStale {
		return fmt.Errorf("--dns-stale %s is out of range: use 0 (never) to %s", c.DNSStale, maxStale)
	}
	// unix(7): sun_path has 108 bytes, with the final NUL.
	if len(c.Socket) > 107 {
		return fmt.Errorf("--socket %s is %d characters long: the longest allowed is 107", c.Socket, len(c.Socket))
	}
	return nil
}

// New locks the data directory and reads who this node is.
func New(cfg Config) (*Agent, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	lock, err := lockDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	ident, err := loadIdentity(cfg.DataDir, cfg.NodeName, hostName, cfg.Log)
	var unfit error
	if err != nil && ident != nil {
		// It runs on, so that a person who asks it is told, and the node can leave.
		unfit, err = err, nil
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	if cfg.NodeName != "" && ident.Name != cfg.NodeName {
		cfg.Log.Warn("the node keeps its name in the cluster: 'shoal node update --name' changes it", "name", ident.Name, "node_name_flag", cfg.NodeName)
	}
	a := &Agent{cfg: cfg, log: cfg.Log.With("node", ident.Name), lock: lock, ident: ident, unfit: unfit, evict: make(chan string, 1)}
	a.metrics = newMetrics(a)
	return a, nil
}

// hostName is the machine's, without its domain.
func hostName() (string, error) {
	h, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("host name: %w: give --node-name", err)
	}
	h, _, _ = strings.Cut(h, ".")
	return h, nil
}

// Run serves until ctx ends. Tasks and the network go on without it, and are
// adopted by the next Run.
func (a *Agent) Run(ctx context.Context) error {
	defer a.lock.Close()
	ln, err := listenUnix(a.cfg.Socket)
	if err != nil {
		return err
	}
	if err := giveToGroup(a.cfg.Socket, a.cfg.SocketGroup); err != nil {
		ln.Close()
		return err
	}
	srv := peer.New(peer.Config{Log: a.log}).Server(a.handler(true), a.log, func() peer.Caller {
		id := a.identity()
		return peer.Caller{Kind: peer.Local, ID: id.NodeID, Cluster: id.Cluster.ID}
	})
	id := a.identity()
	resume := id.Cluster.ID != ""
	if resume {
		a.mu.Lock() // no init, join or leave in between
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(ln); err != nil && !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("API socket closed", "error", err)
		}
	})
	mctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		srv.Close()
		wg.Wait()
	}()
	if err := a.serveMetrics(mctx, &wg); err != nil {
		if resume {
			a.mu.Unlock()
		}
		return err
	}
	if a.cfg.Ready != nil {
		a.cfg.Ready()
	}
	a.log.Info("agent started", "id", id.NodeID, "version", a.cfg.Version, "socket", a.cfg.Socket,
		"data_path", a.cfg.VIP.Name(), "data_path_reason", a.cfg.VIPReason)
	if resume {
		err := a.resume(ctx)
		a.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if names := a.strays(ctx); len(names) > 0 {
		a.log.Error(straysMessage(names), "hint", straysHint)
	}
	for {
		select {
		case <-ctx.Done():
			a.mu.Lock()
			defer a.mu.Unlock()
			halts := a.cfg.GoesDown != nil && a.cfg.GoesDown()
			if m := a.current(); m != nil {
				if halts {
					m.halt()
				}
				a.setMember(nil)
				m.stop()
			}
			if halts {
				a.log.Info("agent stopped, and its tasks")
			} else {
				a.log.Info("agent stopped; tasks go on")
			}
			return nil
		case why := <-a.evict:
			if a.current() == nil || !a.mu.TryLock() {
				continue // it leaves already, or has left
			}
			a.mu.Unlock()
			a.log.Warn("the managers removed this node from the cluster: leaving", "reason", why)
			if err := a.leave(ctx, true); err != nil {
				a.log.Error("leaving failed", "error", err)
			}
		}
	}
}

// resume continues the life in the cluster of node.json. The addresses may
// take a while to come up after a boot. a.mu is held.
func (a *Agent) resume(ctx context.Context) error {
	if a.unfit != nil {
		a.log.Error("the node can't work", "error", a.unfit)
		return nil
	}
	creds, err := loadCredentials(a.cfg.DataDir, a.ident, a.log)
	if err != nil {
		// It runs on, so that the node can leave.
		a.log.Error("the node can't work", "error", err)
		a.memberR.Lock()
		a.unfit = err
		a.memberR.Unlock()
		return nil
	}
	var m *member
	for try := 0; ; try++ {
		if m, err = a.newMember(a.ident, creds); err == nil {
			break
		}
		if try == 0 {
			a.log.Error("the node can't work yet; trying again", "error", err)
		}
		if try == 30 || !sleep.For(ctx, time.Second) {
			return err
		}
	}
	m.serve(a.handler(false))
	if a.ident.Role == spec.RoleManager {
		m.voted = true
		m.keepManager()
	}
	if err := m.start(); err != nil {
		m.stop()
		return err
	}
	a.setMember(m)
	return nil
}

func (a *Agent) evicted(why string) {
	select {
	case a.evict <- why:
	default:
	}
}

func (a *Agent) current() *member {
	a.memberR.RLock()
	defer a.memberR.RUnlock()
	return a.member
}

func (a *Agent) setMember(m *member) {
	a.memberR.Lock()
	a.member = m
	a.memberR.Unlock()
}

func (a *Agent) identity() *identity {
	a.memberR.RLock()
	defer a.memberR.RUnlock()
	return a.ident
}

func (a *Agent) setIdentity(id *identity) {
	a.memberR.Lock()
	a.ident, a.unfit = id, nil
	a.memberR.Unlock()
}

// errNoCluster answers what needs a cluster.
var errNoCluster = connect.NewError(connect.CodeFailedPrecondition,
	errors.New("this node is in no cluster: run 'shoal init' to make one, or 'shoal join' to join one"))

// noMember says why there is no member.
func (a *Agent) noMember() error {
	a.memberR.RLock()
	defer a.memberR.RUnlock()
	if a.unfit != nil {
		return connect.NewError(connect.CodeFailedPrecondition, a.unfit)
	}
	return errNoCluster
}

// startWait is how long a call waits for an agent that is in a cluster, and starts.
const startWait = 30 * time.Second

// need is the member, once it has started: an agent that was only just started is
// in its cluster all the same.
func (a *Agent) need(ctx context.Context) (*member, error) {
	for limit := time.Now().Add(startWait); ; {
		if m := a.current(); m != nil {
			return m, nil
		}
		id := a.identity()
		a.memberR.RLock()
		unfit := a.unfit != nil
		a.memberR.RUnlock()
		if id.Cluster.ID == "" || unfit {
			return nil, a.noMember()
		}
		if time.Now().After(limit) || !sleep.For(ctx, 10*time.Millisecond) {
			return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("node %s is in cluster %s, but its agent is still starting: see the agent's log", id.Name, id.Cluster.ID))
		}
	}
}

// handler serves the API: all of it on the unix socket, all but Local on the
// network.
func (a *Agent) handler(local bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/shoal.v1.Control/", func(w http.ResponseWriter, r *http.Request) {
		m, err := a.need(r.Context())
		if err != nil {
			_ = connect.NewErrorWriter().Write(w, r, err)
			return
		}
		m.fwd.ServeHTTP(w, r)
	})
	mux.HandleFunc(healthPattern, a.health)
	mux.HandleFunc("GET /health/{port}", a.health)
	nodePath, nodeHandler := shoalv1connect.NewNodeHandler(&nodeAPI{a}, peer.CompressLarge())
	mux.Handle(nodePath, a.routeToNode(nodeHandler))
	if local {
		mux.Handle(shoalv1connect.NewLocalHandler(&localAPI{a}, peer.CompressLarge()))
		// Who may use the socket may look where the agent's time goes.
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		mux.Handle("GET "+peer.MetricsPath, a.metrics.handler(a))
	}
	return mux
}

// DefaultSocketGroup is made by the packages.
const DefaultSocketGroup = "shoal"

// giveToGroup lets the members of a group use the API's socket. The default group
// need not be there, one that was asked for must.
func giveToGroup(socket, name string) error {
	if name == "" {
		return nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		if name == DefaultSocketGroup {
			return nil
		}
		return fmt.Errorf("--socket-group %s: there is no group of that name: make it with 'groupadd --system %s'", name, name)
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return fmt.Errorf("--socket-group %s has the ID %q: %w", name, g.Gid, err)
	}
	if err := os.Chown(socket, -1, gid); err != nil {
		return fmt.Errorf("--socket-group %s: %w", name, err)
	}
	return nil
}

// listenUnix listens on a socket that root and its group may use. A file left
// by an agent that was killed is replaced, one that answers is not.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("directory of the API socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("another agent answers at %s: stop it, or give another --socket", path)
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("%s exists and is not a socket: remove it, or give another --socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("stale API socket: %w", err)
		}
	}
	old := unix.Umask(0o117) // mode 0660 from the first moment
	ln, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("API socket: %w", err)
	}
	return ln, nil
}

// ---- Local ----

type localAPI struct{ *Agent }

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

func precondition(format string, args ...any) error {
	return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(format, args...))
}

// Info tells who this node is.
func (a *localAPI) Info(ctx context.Context, _ *connect.Request[shoalv1.InfoRequest]) (*connect.Response[shoalv1.InfoResponse], error) {
	resp := &shoalv1.InfoResponse{Version: a.cfg.Version, DataPath: a.cfg.VIP.Name(), DataPathReason: a.cfg.VIPReason, DataDir: a.cfg.DataDir, Level: state.Level, LevelBrings: state.Levels[state.Level]}
	resp.ContainersOk, resp.Containers = a.containers(ctx)
	resp.Limits = cgroup.Supported().String()
	if m := a.current(); m != nil {
		resp.Cluster = m.ident.Cluster.ID
		resp.Node = api.Node(m.node(m.role()))
		resp.Leader = m.leader()
		m.levels(resp)
		resp.Locked = errors.As(m.managerFault(), &control.LockedError{})
		for _, f := range m.diskFaults() {
			resp.Problems = append(resp.Problems, f.message)
		}
		if info, ok := m.creds.Info(); ok {
			resp.CertificateFromMs, resp.CertificateEndMs, resp.CertificateRole = info.From.UnixMilli(), info.Until.UnixMilli(), info.Role
			resp.Ca, resp.Roots = info.Root, info.Roots
		}
	} else {
		id := a.identity()
		resp.Cluster = id.Cluster.ID // it starts
		resp.Node = &shoalv1.NodeInfo{Id: id.NodeID, Name: id.Name, Role: id.Role, DataPath: a.cfg.VIP.Name()}
	}
	return connect.NewResponse(resp), nil
}

// busyWait is how long an init, join or leave waits for another before it is refused.
const busyWait = 2 * time.Second

// enter locks a.mu for what takes the node into a cluster or out of one. Who only looks,
// as an agent does that starts, holds it for a moment; another init, join or leave for
// longer.
func (a *Agent) enter(ctx context.Context) error {
	for end := time.Now().Add(busyWait); !a.mu.TryLock(); {
		if time.Now().After(end) || !sleep.For(ctx, 10*time.Millisecond) {
			return precondition("this node is already busy with an init, join or leave: wait for it")
		}
	}
	return nil
}

// Init makes a cluster of this node.
func (a *localAPI) Init(ctx context.Context, req *connect.Request[shoalv1.InitRequest]) (*connect.Response[shoalv1.InitResponse], error) {
	if err := a.enter(ctx); err != nil {
		return nil, err
	}
	defer a.mu.Unlock()
	if req.Msg.ForceNewCluster {
		resp, err := a.recoverCluster(ctx)
		if err != nil {
			return nil, err
		}
		return connect.NewResponse(resp), nil
	}
	if a.ident.Cluster.ID != "" {
		return nil, precondition("this node is already in cluster %s: run 'shoal leave' first", a.ident.Cluster.ID)
	}
	r := req.Msg
	cluster := state.Cluster{ID: spec.NewID(), SubnetSize: int(r.SubnetSize), DataPathPort: int(r.DataPathPort), Created: time.Now().UnixMilli()}
	if cluster.SubnetSize == 0 {
		cluster.SubnetSize = DefaultSubnetSize
	}
	if cluster.DataPathPort == 0 {
		cluster.DataPathPort = DefaultDataPathPort
	}
	if cluster.DataPathPort < 1024 || cluster.DataPathPort > 49151 {
		return nil, invalid("data path port %d is out of range: use 1024 to 49151, outside of the ephemeral ports", cluster.DataPathPort)
	}
	pools := r.AddressPools
	if len(pools) == 0 {
		pools = []string{DefaultPool}
	}
	for _, p := range pools {
		pfx, err := netip.ParsePrefix(p)
		if err != nil {
			return nil, invalid("address pool %q: want an address and a prefix length, like 10.0.0.0/8", p)
		}
		cluster.Pools = append(cluster.Pools, pfx)
	}
	ident, err := a.newIdentity(r.AdvertiseAddr, spec.RoleManager)
	if err != nil {
		return nil, err
	}
	ident.Cluster = cluster
	if err := a.checkPorts(ident); err != nil {
		return nil, err
	}
	tr, root, err := control.NewTrust(cluster.ID)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	creds, err := peer.NewCredentials()
	if err == nil {
		err = certify(creds, root, ident, 1)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	ident.CA = root.Digest()
	m, err := a.newMember(ident, creds)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if r.Autolock {
		tr.Unlock, tr.UnlockGeneration = control.NewUnlockKey(), 1
		if err := m.takeLock(&shoalv1.Lock{Key: tr.Unlock, Generation: tr.UnlockGeneration}); err != nil {
			a.abandon(m)
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	m.serve(a.handler(false))
	err = func() error {
		mgr, err := m.startManager(true)
		if err != nil {
			return err
		}
		n, err := mgr.Bootstrap(ctx, cluster, tr)
		if err != nil {
			return err
		}
		ident.Number = n.Number
		m.assigned = &assignment{Trust: toTrust(control.TrustInfo(tr))}
		if err := creds.Save(peer.Path(a.cfg.DataDir)); err != nil {
			return err
		}
		if err := ident.save(a.cfg.DataDir); err != nil {
			return err
		}
		return m.start()
	}()
	if err != nil {
		a.abandon(m)
		return nil, err
	}
	a.setIdentity(ident)
	a.setMember(m)
	return connect.NewResponse(&shoalv1.InitResponse{Cluster: cluster.ID, Node: api.Node(m.node(spec.RoleManager)),
		WorkerToken: control.Tokens(tr, spec.RoleWorker).String(), ManagerToken: control.Tokens(tr, spec.RoleManager).String(), UnlockKey: tr.Unlock}), nil
}

// Join makes this node a member of the cluster that a manager names.
func (a *localAPI) Join(ctx context.Context, req *connect.Request[shoalv1.JoinRequest]) (*connect.Response[shoalv1.JoinResponse], error) {
	if err := a.enter(ctx); err != nil {
		return nil, err
	}
	defer a.mu.Unlock()
	if a.ident.Cluster.ID != "" {
		return nil, precondition("this node is already in cluster %s: run 'shoal leave' first", a.ident.Cluster.ID)
	}
	r := req.Msg
	switch r.Role {
	case "", spec.RoleManager, spec.RoleWorker:
	default:
		return nil, invalid("role %q: use manager or worker", r.Role)
	}
	remote := r.Remote
	if remote == "" {
		return nil, invalid("no manager is named: give the address of one, like 'shoal join 192.0.2.1'")
	}
	if _, _, err := net.SplitHostPort(remote); err != nil {
		remote = net.JoinHostPort(strings.Trim(remote, "[]"), strconv.Itoa(DefaultControlPort))
	}
	token, err := peer.ParseToken(r.Token)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	ident, err := a.newIdentity(r.AdvertiseAddr, r.Role)
	if err != nil {
		return nil, err
	}
	if at, err := netip.ParseAddrPort(remote); err == nil && at == netip.AddrPortFrom(ident.Addr, uint16(ident.ControlPort)) {
		return nil, invalid("%s is this node itself: give the address of one that is in the cluster", remote)
	}
	if err := a.checkPorts(ident); err != nil {
		return nil, err
	}
	creds, err := peer.NewCredentials()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	csr, err := peer.Request(creds.Signer())
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	m, err := a.newMember(ident, creds)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	m.serve(a.handler(false))
	joiner := peer.Joiner(remote, token.Digest)
	defer joiner.CloseIdleConnections()
	client := shoalv1connect.NewControlClient(joiner, "http://"+remote)
	var managers []*shoalv1.NodeInfo // once they know this node
	err = func() error {
		jctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		resp, err := client.JoinNode(jctx, connect.NewRequest(&shoalv1.JoinNodeRequest{Node: api.Node(m.node(r.Role)), Token: token.Secret, Csr: csr}))
		if err != nil {
			var wrong *peer.WrongClusterError
			var handshake *peer.HandshakeError
			switch {
			case errors.As(err, &wrong):
				return connect.NewError(connect.CodePermissionDenied, wrong)
			case errors.As(err, &handshake):
				return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s answers, but not as a manager that can be joined: %w", remote, handshake.Err))
			}
			if connect.CodeOf(err) == connect.CodeUnavailable {
				return connect.NewError(connect.CodeUnavailable, fmt.Errorf("no manager answers at %s: check the address, and that port %s/tcp is open: %w", remote, port(remote), err))
			}
			return err
		}
		managers = resp.Msg.Managers
		if ident.Cluster, err = clusterOf(resp.Msg.Cluster); err != nil {
			return err
		}
		if err := creds.Set(resp.Msg.Certificate.GetChain(), resp.Msg.Certificate.GetRoots()); err != nil {
			return fmt.Errorf("the manager's answer: %w", err)
		}
		info, _ := creds.Info()
		if info.ID != ident.NodeID || info.Cluster != ident.Cluster.ID {
			return fmt.Errorf("the manager's answer has a certificate for node %s of cluster %s", info.ID, info.Cluster)
		}
		ident.Role, ident.CA = info.Role, token.Digest
		m.assigned = &assignment{Trust: toTrust(resp.Msg.Trust)}
		ident.Number = int(resp.Msg.Node.GetNumber())
		if ident.Number == 0 {
			return fmt.Errorf("the manager's answer has no node number")
		}
		if err := checkUDPPort("VXLAN", netip.AddrPortFrom(ident.Addr, uint16(ident.Cluster.DataPathPort)), dataPathPortFlag); err != nil {
			return err
		}
		ident.Managers = []string{remote}
		for _, n := range managers {
			if at := controlAddrOf(n); at != remote {
				ident.Managers = append(ident.Managers, at)
			}
		}
		if err := creds.Save(peer.Path(a.cfg.DataDir)); err != nil {
			return err
		}
		if err := ident.save(a.cfg.DataDir); err != nil {
			return err
		}
		var mgr *control.Manager
		if ident.Role == spec.RoleManager {
			if err := m.takeLock(resp.Msg.Lock); err != nil {
				return err
			}
			if mgr, err = m.startManager(true); err != nil {
				return err
			}
		}
		if err := m.start(); err != nil {
			return err
		}
		var peers []netip.AddrPort
		for _, n := range resp.Msg.Managers {
			if v, err := api.ToNode(n); err == nil && v.ID != ident.NodeID {
				peers = append(peers, netip.AddrPortFrom(v.Addr, uint16(v.GossipPort)))
			}
		}
		m.g.Join(peers)
		if mgr == nil {
			return nil
		}
		// Its own socket leads nowhere before it is a member: reports need that.
		a.setIdentity(ident)
		a.setMember(m)
		return m.awaitManager(ctx, mgr)
	}()
	if err != nil {
		a.setMember(nil)
		if managers != nil {
			if rerr := m.unjoin(context.WithoutCancel(ctx), managers); rerr != nil {
				err = fmt.Errorf("%w (and the managers still list this node: run 'shoal node rm --force %s' on one of them: %w)", err, ident.Name, rerr)
			}
		}
		a.abandon(m)
		return nil, err
	}
	a.setIdentity(ident)
	a.setMember(m)
	return connect.NewResponse(&shoalv1.JoinResponse{Cluster: ident.Cluster.ID, Node: api.Node(m.node(m.role()))}), nil
}

func port(hostport string) string {
	_, p, _ := net.SplitHostPort(hostport)
	return p
}

// newIdentity is this node's identity in a cluster it is about to enter.
func (a *Agent) newIdentity(advertise, role string) (*identity, error) {
	// Only now: a node that is in a cluster may be called so from before.
	if err := spec.ValidateNewName("node", a.ident.Name); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%w: start the agent with another --node-name", err))
	}
	if advertise == "" {
		advertise = a.cfg.AdvertiseAddr
	}
	addr, err := advertiseAddr(advertise)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := a.removeClusterFiles(); err != nil {
		return nil, err
	}
	return &identity{Format: identityFormat, NodeID: a.ident.NodeID, Name: a.ident.Name, Role: role, Addr: addr,
		ControlPort: a.cfg.ControlPort, GossipPort: a.cfg.GossipPort}, nil
}

// checkPorts tries the ports that are opened only once the managers know of
// this node, so that a taken one leaves nothing half-made.
func (a *Agent) checkPorts(id *identity) error {
	gossip := netip.AddrPortFrom(id.Addr, uint16(id.GossipPort))
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(gossip))
	if err != nil {
		return connect.NewError(connect.CodeFailedPrecondition, listenError("gossip", "tcp", gossip, "--gossip-port", err))
	}
	ln.Close()
	if err := checkUDPPort("gossip", gossip, "--gossip-port"); err != nil {
		return connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if p := id.Cluster.DataPathPort; p != 0 {
		if err := checkUDPPort("VXLAN", netip.AddrPortFrom(id.Addr, uint16(p)), dataPathPortFlag); err != nil {
			return connect.NewError(connect.CodeFailedPrecondition, err)
		}
	}
	return nil
}

// abandon undoes a failed init or join.
func (a *Agent) abandon(m *member) {
	m.stop()
	if err := a.forget(); err != nil {
		a.log.Error("a failed init or join left something behind", "error", err)
	}
}

// forget makes this node one of no cluster, on disk and in the kernel.
func (a *Agent) forget() error {
	errs := []error{a.cfg.Cleanup(), a.removeClusterFiles()}
	// A new ID: the old one is of the old cluster.
	id := &identity{Format: identityFormat, NodeID: spec.NewID(), Name: a.ident.Name}
	a.setIdentity(id)
	errs = append(errs, id.save(a.cfg.DataDir))
	return errors.Join(errs...)
}

// newMember is a member that tells this agent of its end and counts in its metrics.
func (a *Agent) newMember(ident *identity, creds *peer.Credentials) (*member, error) {
	m, err := newMember(a.cfg, ident, creds, a.log)
	if err != nil {
		return nil, err
	}
	m.evicted, m.metrics = a.evicted, a.metrics
	return m, nil
}

// removeClusterFiles removes what a life in a cluster leaves on disk: of one
// that was left, or of an init or join that was cut short by the agent's death.
func (a *Agent) removeClusterFiles() error {
	errs := []error{durable.RemoveTwice(peer.Path(a.cfg.DataDir))}
	for _, p := range []string{control.MarkPath(a.cfg.DataDir), control.RaftDir(a.cfg.DataDir), control.LostPath(a.cfg.DataDir), assignmentPath(a.cfg.DataDir), givenPath(a.cfg.DataDir), filepath.Join(a.cfg.DataDir, "gossip"), control.LockPath(a.cfg.DataDir)} {
		errs = append(errs, os.RemoveAll(p))
	}
	return errors.Join(errs...)
}

// Leave takes this node out of its cluster and removes everything Shoal made
// on it.
func (a *localAPI) Leave(ctx context.Context, req *connect.Request[shoalv1.LeaveRequest]) (*connect.Response[shoalv1.LeaveResponse], error) {
	if err := a.leave(ctx, req.Msg.Force); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.LeaveResponse{}), nil
}

func (a *Agent) leave(ctx context.Context, force bool) error {
	if err := a.enter(ctx); err != nil {
		return err
	}
	defer a.mu.Unlock()
	m := a.current()
	if m == nil {
		if a.ident.Cluster.ID == "" && !force {
			return a.noMember()
		}
		// With force what a lost data directory told of is cleared away, too.
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*spec.DefaultStopGrace)
		defer cancel()
		return errors.Join(a.removeTasks(sctx), a.forget())
	}
	// The managers first: they must agree, and then give this node nothing new.
	if err := m.depart(ctx, force); err != nil && !force {
		return err
	} else if err != nil {
		a.log.Warn("leaving without the managers' consent", "error", err)
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*spec.DefaultStopGrace)
	defer cancel()
	var errs []error
	if err := m.tasks.stopAll(sctx); err != nil {
		errs = append(errs, err)
	}
	if err := m.g.Leave(sctx); err != nil {
		a.log.Warn("the other nodes may see this one fail instead of leave", "error", err)
	}
	a.setMember(nil)
	m.stop()
	// What a runner could not stop in time.
	errs = append(errs, a.removeTasks(sctx), a.forget())
	return errors.Join(errs...)
}

// removeTasks ends all that the runtime has.
func (a *Agent) removeTasks(ctx context.Context) error {
	left, err := a.cfg.Runtime.List(ctx)
	errs := []error{err}
	for _, t := range left {
		errs = append(errs, a.cfg.Runtime.Remove(ctx, t.ID))
	}
	return errors.Join(errs...)
}

// strays are the tasks that run here though the node is in no cluster, those of one that
// a lost data directory told of: no manager knows of them, and nothing leads to them.
func (a *Agent) strays(ctx context.Context) (names []string) {
	if !a.mu.TryLock() {
		return nil // it is about to enter a cluster, or leaves one
	}
	defer a.mu.Unlock()
	if a.identity().Cluster.ID != "" || !errors.Is(a.noMember(), errNoCluster) {
		return nil
	}
	have, err := a.cfg.Runtime.List(ctx)
	if err != nil {
		a.log.Warn("whether tasks of before run here is not known", "error", err)
	}
	for _, t := range have {
		if t.State == runtime.Running {
			names = append(names, t.Name)
		}
	}
	slices.Sort(names)
	return names
}

// straysHint says what to do about strays.
const straysHint = "'shoal leave --force' ends them and clears their networks away; so does joining a cluster that knows nothing of them. Or put the lost data directory back and start the agent anew"

// straysMessage says what strays there are, for a person.
func straysMessage(names []string) string {
	return "this node is in no cluster, yet tasks of one run here, which no manager knows of: " + spec.Few(names)
}

// Doctor looks for what is wrong here.
func (a *localAPI) Doctor(ctx context.Context, _ *connect.Request[shoalv1.DoctorRequest]) (*connect.Response[shoalv1.DoctorResponse], error) {
	return connect.NewResponse(a.doctor(ctx)), nil
}
