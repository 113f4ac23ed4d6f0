package state

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// snapshotVersion is that of the format below. A format that an older Shoal
// would misread takes another.
const snapshotVersion = 1

// The snapshot is JSON without maps of ours: the same state gives the same bytes.
// What can be computed from the rest (indices, which addresses are taken) is not
// in it.
type snapshot struct {
	Version    int               `json:"version"`
	Index      uint64            `json:"index"`
	Cluster    *Cluster          `json:"cluster,omitempty"`
	Default    string            `json:"default_network,omitempty"`
	LastSubnet netip.Prefix      `json:"last_subnet"`
	LastVNI    uint32            `json:"last_vni"`
	LastNumber int               `json:"last_number"`
	Seq        uint64            `json:"seq"`
	Networks   []networkSnapshot `json:"networks"`
	Services   []serviceSnapshot `json:"services"`
	Nodes      []spec.Node       `json:"nodes"`
	Tasks      []taskSnapshot    `json:"tasks"`
	Trust      *Trust            `json:"trust,omitempty"`
	Expelled   []string          `json:"expelled,omitempty"` // IDs of nodes
	Level      int               `json:"level,omitempty" level:"1"`
	Blobs      []spec.Blob       `json:"blobs,omitempty" level:"2"`
}

type networkSnapshot struct {
	Network spec.Network `json:"network"`
	Cursors []netip.Addr `json:"cursors"` // of its subnets
}

type serviceSnapshot struct {
	Service spec.Service `json:"service"`
	Removed bool         `json:"removed,omitempty"`
	Rev     uint64       `json:"rev"`
	PrevRev uint64       `json:"prev_rev,omitempty" level:"2"`
}

type taskSnapshot struct {
	Task    spec.Task      `json:"task"`
	Seq     uint64         `json:"seq"`
	Rev     uint64         `json:"rev,omitempty"`
	Started int64          `json:"started,omitempty"`
	Ended   int64          `json:"ended,omitempty"`
	Was     spec.TaskState `json:"was"`
}

// Snapshot returns the whole state. States that the same log led to give the
// same bytes.
func (s *State) Snapshot() ([]byte, error) {
	out := snapshot{Version: snapshotVersion, Index: s.index, Cluster: s.cluster, Default: s.defaultNet, LastSubnet: s.lastSubnet,
		LastVNI: s.lastVNI, LastNumber: s.lastNumber, Seq: s.seq, Trust: s.trust, Level: s.level}
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		n := s.networks[id]
		ns := networkSnapshot{Network: n.Network}
		for _, sp := range n.spaces {
			ns.Cursors = append(ns.Cursors, sp.Cursor())
		}
		out.Networks = append(out.Networks, ns)
	}
	for _, id := range slices.Sorted(maps.Keys(s.services)) {
		v := s.services[id]
		out.Services = append(out.Services, serviceSnapshot{v.Service, v.removed, v.rev, v.prevRev})
	}
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		out.Nodes = append(out.Nodes, s.nodes[id].Node)
		if s.nodes[id].expelled {
			out.Expelled = append(out.Expelled, id)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.blobs)) {
		out.Blobs = append(out.Blobs, *s.blobs[id])
	}
	for _, t := range s.tasks {
		out.Tasks = append(out.Tasks, taskSnapshot{t.Task, t.seq, t.rev, t.started, t.ended, t.was})
	}
	slices.SortFunc(out.Tasks, func(a, b taskSnapshot) int { return cmp.Compare(a.Seq, b.Seq) })
	b, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("snapshot of the cluster's state: %w", err)
	}
	return b, nil
}

// Restore is the inverse of Snapshot. It refuses what contradicts itself.
func Restore(b []byte) (*State, error) {
	s, err := restore(b)
	if err != nil {
		return nil, fmt.Errorf("restore the cluster's state: %w", err)
	}
	return s, nil
}

func restore(b []byte) (*State, error) {
	var in snapshot
	if err := json.Unmarshal(b, &struct {
		Version *int `json:"version"`
		Level   *int `json:"level"`
	}{&in.Version, &in.Level}); err != nil {
		return nil, err
	}
	if in.Level > Level {
		return nil, failf(ErrLevel, "the cluster is at feature level %d, and this Shoal has level %d: use a Shoal of level %d or newer", in.Level, Level, in.Level)
	}
	if in.Version != snapshotVersion {
		return nil, fmt.Errorf("snapshot has version %d, this Shoal reads %d: use the Shoal that wrote it", in.Version, snapshotVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&in); err != nil {
		return nil, err
	}
	s := New()
	s.index, s.cluster, s.defaultNet, s.lastSubnet = in.Index, in.Cluster, in.Default, in.LastSubnet
	s.lastVNI, s.lastNumber, s.seq = in.LastVNI, in.LastNumber, in.Seq
	s.changed, s.goneFrom, s.level = s.index, s.index, in.Level
	if err := in.Trust.check(); err != nil {
		return nil, err
	}
	s.trust = in.Trust
	for _, ns := range in.Networks {
		n := ns.Network
		if err := n.Validate(); err != nil {
			return nil, err
		}
		if s.netNames[n.Name] != "" || s.networks[n.ID] != nil || (n.Wired() && s.vnis[n.VNI] != "") {
			return nil, fmt.Errorf("network %s, or its VNI %d, is there twice", n.Name, n.VNI)
		}
		w, err := newNetwork(n)
		if err != nil {
			return nil, err
		}
		if len(ns.Cursors) != len(w.spaces) {
			return nil, fmt.Errorf("network %s: %d cursors for %d subnets", n.Name, len(ns.Cursors), len(w.spaces))
		}
		for i, c := range ns.Cursors {
			w.spaces[i].SetCursor(c)
		}
		s.addNetwork(w)
	}
	if s.cluster != nil && s.networks[s.defaultNet] == nil {
		return nil, fmt.Errorf("the default network %q is missing", s.defaultNet)
	}
	for _, n := range in.Nodes {
		if s.nodes[n.ID] != nil || s.numbers[n.Number] != "" || n.Number < 1 || n.Number > spec.MaxNodes {
			return nil, fmt.Errorf("node %s: its ID or its number %d is there twice or out of range", n.Name, n.Number)
		}
		s.addNode(&node{Node: n, tasks: map[string]*task{}})
	}
	for _, id := range in.Expelled {
		if s.nodes[id] == nil {
			return nil, fmt.Errorf("node %s is expelled, and does not exist", id)
		}
		s.nodes[id].expelled = true
	}
	for _, vs := range in.Services {
		v := &service{Service: vs.Service, removed: vs.Removed, rev: vs.Rev, prevRev: vs.PrevRev}
		if err := v.Spec.Validate(); err != nil {
			return nil, err
		}
		if s.services[v.ID] != nil || (!v.removed && s.svcNames[v.Spec.Name] != "") {
			return nil, fmt.Errorf("service %s is there twice", v.Spec.Name)
		}
		for _, a := range v.Spec.Networks {
			// What a removed service would be on is of no use to anyone.
			if s.networks[a.Network] == nil && !v.removed {
				return nil, fmt.Errorf("service %s is on network %s, which does not exist", v.Spec.Name, a.Network)
			}
		}
		for _, a := range v.VIPs {
			if err := s.retake(a.Network, a.Addrs, v.holder()); err != nil {
				return nil, err
			}
		}
		s.services[v.ID] = v
		if v.removed {
			s.removed[v.ID] = v
		} else {
			if err := checkPorts(v.Service); err != nil {
				return nil, err
			}
			if v.Ingress != "" {
				if s.networks[v.Ingress] == nil {
					return nil, fmt.Errorf("service %s: its ports lead to network %s, which does not exist", v.Spec.Name, v.Ingress)
				}
				s.published[v.ID] = v
			}
			s.svcNames[v.Spec.Name] = v.ID
		}
	}
	for _, b := range in.Blobs {
		if err := b.Validate(); err != nil {
			return nil, err
		}
		if s.blobs[b.ID] != nil {
			return nil, fmt.Errorf("%s %s is there twice", b.Kind, b.Name)
		}
		s.blobs[b.ID] = &b
	}
	for _, ts := range in.Tasks {
		t := &task{Task: ts.Task, seq: ts.Seq, rev: ts.Rev, started: ts.Started, ended: ts.Ended, was: ts.Was}
		if s.tasks[t.ID] != nil || t.seq > s.seq {
			return nil, fmt.Errorf("task %s is there twice, or has the number %d beyond the last", t.Name, t.seq)
		}
		if t.Service != "" && s.services[t.Service] == nil {
			return nil, fmt.Errorf("task %s is of service %s, which does not exist", t.Name, t.Service)
		}
		if t.holds() {
			if s.nodes[t.Node] == nil {
				return nil, fmt.Errorf("task %s is on node %s, which does not exist", t.Name, t.Node)
			}
			for _, a := range t.Attachments {
				if err := s.retake(a.Network, a.Addrs, t.holder()); err != nil {
					return nil, err
				}
			}
		}
		s.put(t)
	}
	return s, nil
}
