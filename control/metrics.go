package control

import (
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// MaxServiceSeries is how many services have series of their own in a metric; what
// is beyond is summed up under [OtherServices].
const MaxServiceSeries = 1000

// OtherServices is no name that a service can have.
const OtherServices = "(others)"

// metrics of a manager. What the leader says of the cluster no other manager says,
// so that a sum over all nodes counts nothing twice.
var (
	raftDesc = func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("shoal_raft_"+name, help, nil, nil)
	}
	clusterDesc = func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("shoal_cluster_"+name, help+" Only the leading manager tells.", labels, nil)
	}
	descLeader      = raftDesc("leader", "1: this manager leads the cluster.")
	descLeaderKnown = raftDesc("leader_known", "1: this manager knows a leader.")
	descTerm        = raftDesc("term", "Term of raft.")
	descCommitted   = raftDesc("commit_index", "Index of the last entry that is committed.")
	descApplied     = raftDesc("applied_index", "Index of the last entry that this manager has applied.")
	descLast        = raftDesc("last_index", "Index of the last entry in this manager's log.")
	descContact     = raftDesc("last_contact_seconds", "Time since this manager heard of the leader; 0 on the leader.")
	descVoters      = raftDesc("voters", "Managers that vote, as this one has it.")
	descStuck       = raftDesc("stuck", "1: this manager met an entry that it can't read, and applies nothing more.")

	descNodes    = clusterDesc("nodes", "Nodes, by status, role and availability.", "status", "role", "availability")
	descNetworks = clusterDesc("networks", "Networks.")
	descServices = clusterDesc("services", "Services.")
	descTasks    = clusterDesc("tasks", "Tasks that are kept, by state.", "state")
	descDesired  = clusterDesc("service_replicas_desired", "Replicas that a service shall have.", "service")
	descRunning  = clusterDesc("service_replicas_running", "Replicas of a service that run.", "service")
)

// Describe implements prometheus.Collector.
func (m *Manager) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descLeader, descLeaderKnown, descTerm, descCommitted, descApplied, descLast, descContact, descVoters, descStuck,
		descNodes, descNetworks, descServices, descTasks, descDesired, descRunning} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Manager) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	is := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	leads := m.IsLeader()
	id, _ := m.Leader()
	gauge(descLeader, is(leads))
	gauge(descLeaderKnown, is(id != ""))
	gauge(descTerm, float64(m.raft.CurrentTerm()))
	gauge(descCommitted, float64(m.raft.CommitIndex()))
	gauge(descApplied, float64(m.raft.AppliedIndex()))
	gauge(descLast, float64(m.raft.LastIndex()))
	if m.raft.State() == raft.Leader {
		gauge(descContact, 0)
	} else if at := m.raft.LastContact(); !at.IsZero() {
		gauge(descContact, time.Since(at).Seconds())
	}
	voters := 0
	for _, s := range m.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage == raft.Voter {
			voters++
		}
	}
	gauge(descVoters, float64(voters))
	gauge(descStuck, is(m.Stuck() != nil))
	if !leads {
		return
	}
	type nodeKind struct{ status, role, availability string }
	nodes, tasks := map[nodeKind]int{}, map[string]int{}
	desired, running := map[string]int{}, map[string]int{}
	networks, services := 0, 0
	for _, s := range spec.TaskStates() {
		tasks[s] = 0
	}
	m.fsm.read(func(st *state.State) {
		for _, n := range st.Nodes() {
			nodes[nodeKind{n.Status, n.Role, n.Availability}]++
		}
		networks = len(st.Networks())
		for state, n := range st.TaskStates() {
			tasks[state.String()] = n
		}
		for i, v := range st.Services() { // by name: those beyond the bound are the same ones for as long as names are
			services++
			name := v.Spec.Name
			if i >= MaxServiceSeries {
				name = OtherServices
			}
			desired[name] += st.Desired(v.ID)
			running[name] += st.Running(v.ID)
		}
	})
	for k, n := range nodes {
		gauge(descNodes, float64(n), k.status, k.role, k.availability)
	}
	gauge(descNetworks, float64(networks))
	gauge(descServices, float64(services))
	for s, n := range tasks {
		gauge(descTasks, float64(n), s)
	}
	for name, n := range desired {
		gauge(descDesired, float64(n), name)
		gauge(descRunning, float64(running[name]), name)
	}
}
