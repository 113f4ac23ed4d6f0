package spec

import (
	"reflect"
	"slices"
)

// Change is in which parts two Views differ.
type Change uint

// Parts of a View.
const (
	ChangedSelf      Change = 1 << iota // Self, Instance, Complete or Underlay
	ChangedPeers                        // or Agents
	ChangedNetworks                     // which there are, or a Version
	ChangedServices                     // which there are, or a Version
	ChangedEndpoints                    // but for their State; or Away
	ChangedStates                       // of endpoints
	ChangedDrains                       // which endpoints drain
	ChangedSandboxes

	ChangedAll = 1<<iota - 1
)

// In tells whether any of some parts differs.
func (c Change) In(parts Change) bool { return c&parts != 0 }

// Changes compares two Views whose networks and services are the managers' of one
// leadership: what has one Version has one content. It is far cheaper than to make again
// what is made of a View.
func (v *View) Changes(was *View) Change {
	if was == nil {
		return ChangedAll
	}
	var c Change
	if v.Self != was.Self || v.Instance != was.Instance || v.Complete != was.Complete || v.Underlay != was.Underlay {
		c |= ChangedSelf
	}
	if !slices.Equal(v.Peers, was.Peers) || !slices.Equal(v.Agents, was.Agents) {
		c |= ChangedPeers
	}
	if !equal(v.Networks, was.Networks, func(a, b *Network) bool { return a.ID == b.ID && a.Version == b.Version }) {
		c |= ChangedNetworks
	}
	if !equal(v.Services, was.Services, func(a, b *Service) bool { return a.ID == b.ID && a.Version == b.Version }) {
		c |= ChangedServices
	}
	if !equal(v.Endpoints, was.Endpoints, func(a, b *Endpoint) bool {
		if a.State != b.State {
			c |= ChangedStates
			if a.State == EndpointDraining || b.State == EndpointDraining {
				c |= ChangedDrains
			}
		}
		return a.equalButState(b)
	}) {
		c |= ChangedEndpoints | ChangedStates | ChangedDrains // the rest of them was not compared
	}
	if !equal(v.Away, was.Away, func(a, b *Endpoint) bool { return a.Equal(*b) }) {
		c |= ChangedEndpoints
	}
	if !equal(v.Sandboxes, was.Sandboxes, func(a, b *Sandbox) bool { return reflect.DeepEqual(a, b) }) {
		c |= ChangedSandboxes
	}
	return c
}

// equal is slices.EqualFunc without copies of what is compared.
func equal[T any](a, b []T, same func(a, b *T) bool) bool {
	if len(a) != len(b) {
		return false
	}
	if len(a) > 0 && &a[0] == &b[0] {
		return true
	}
	for i := range a {
		if !same(&a[i], &b[i]) {
			return false
		}
	}
	return true
}
