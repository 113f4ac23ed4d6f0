package main

import (
	"time"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// The JSON forms are the project's own nouns, with instants as RFC 3339 has them,
// names of networks beside their IDs, and what only the leader knows. A field here
// hides that of the noun with the same name.

// instant is a moment of the API's, in milliseconds; 0 is none.
func instant(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

type serviceJSON struct {
	spec.Service
	Spec        serviceSpecJSON `json:"spec"`
	VIPs        []vipsJSON      `json:"vips,omitempty"`
	IngressName string          `json:"ingress_name,omitempty"`
	Created     time.Time       `json:"created"`
	Running     int             `json:"running"`
	Desired     int             `json:"desired"`

	Previous *spec.ServiceSpec `json:"previous_spec,omitempty"`
	Update   *updateStatusJSON `json:"update_status,omitempty"`
}

type updateStatusJSON struct {
	spec.UpdateStatus
	StartedAt   time.Time `json:"started_at"`
	CompletedAt time.Time `json:"completed_at,omitzero"`
}

type serviceSpecJSON struct {
	spec.ServiceSpec
	Networks []networkAttachmentJSON `json:"networks"`
}

type networkAttachmentJSON struct {
	spec.NetworkAttachment
	NetworkName string `json:"network_name"`
}

type vipsJSON struct {
	spec.VIPs
	NetworkName string `json:"network_name"`
}

func toServiceJSON(s *shoalv1.Service, nets names) (serviceJSON, error) {
	v, err := api.ToService(s)
	v.Spec.Task.RegistryAuth = "" // it is to be seen nowhere
	out := serviceJSON{Service: v, Spec: serviceSpecJSON{v.Spec, nil}, Created: instant(v.Created), Running: int(s.Running), Desired: int(s.Desired), Previous: v.Previous}
	if out.Previous != nil {
		out.Previous.Task.RegistryAuth = ""
	}
	if u := v.Update; u != nil {
		out.Update = &updateStatusJSON{*u, instant(u.StartedAt), instant(u.CompletedAt)}
	}
	for _, a := range v.Spec.Networks {
		out.Spec.Networks = append(out.Spec.Networks, networkAttachmentJSON{a, nets.Of(a.Network)})
	}
	for _, a := range v.VIPs {
		out.VIPs = append(out.VIPs, vipsJSON{a, nets.Of(a.Network)})
	}
	if v.Ingress != "" {
		out.IngressName = nets.Of(v.Ingress)
	}
	return out, err
}

type taskJSON struct {
	spec.Task
	Attachments []attachmentJSON `json:"attachments"`
	Status      taskStatusJSON   `json:"status"`
	Created     time.Time        `json:"created"`
	NotBefore   time.Time        `json:"not_before,omitzero"`
	NodeName    string           `json:"node_name"`
	Faults      []nodeFault      `json:"faults,omitempty"`
}

type attachmentJSON struct {
	spec.Attachment
	NetworkName string `json:"network_name"`
}

type taskStatusJSON struct {
	spec.TaskStatus
	At time.Time `json:"at"`
}

func toTaskJSON(t *shoalv1.Task, nodes, nets names) (taskJSON, error) {
	v, err := api.ToTask(t)
	v.Spec.RegistryAuth = "" // it is to be seen nowhere
	out := taskJSON{Task: v, Status: taskStatusJSON{v.Status, instant(v.Status.At)}, Created: instant(v.Created), NotBefore: instant(v.NotBefore),
		NodeName: nodes[v.Node], Faults: nodeFaults(t.Faults)}
	for _, a := range v.Attachments {
		out.Attachments = append(out.Attachments, attachmentJSON{a, nets.Of(a.Network)})
	}
	return out, err
}

type nodeJSON struct {
	spec.Node
	Created time.Time `json:"created"`
	Leader  bool      `json:"leader"`
	// Unreached are names of live nodes that VXLAN does not reach from here, or from
	// which it does not reach this one.
	Unreached []string `json:"unreached,omitempty"`
}

func toNodeJSON(n *shoalv1.NodeInfo) (nodeJSON, error) {
	v, err := api.ToNode(n)
	return nodeJSON{v, instant(v.Created), n.Leader, n.Unreached}, err
}

type networkJSON struct {
	spec.Network
	Created time.Time `json:"created"`
}

func toNetworkJSON(n *shoalv1.Network) (networkJSON, error) {
	v, err := api.ToNetwork(n)
	return networkJSON{v, instant(v.Created)}, err
}
