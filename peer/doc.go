// Package peer is how nodes know each other: the cluster's authority and its
// certificates, one listener and one dialer with TLS 1.3 in both directions, and
// one table that says which call who may make.
//
//	joiner ── token: digest of the root, secret ──► manager: checks, signs
//	node ── certificate: CN node ID, OU role, O cluster ID ──► node
//
// A node's key is made when it joins and stays its own until it leaves; renewal,
// another role and another root give it another certificate for the same key. So
// whoever knows the node's public key (it is in every assignment) can check what
// the node signs without asking which certificate it has at the moment.
//
// # Who is still in
//
// A certificate says who its holder was when it was signed. Who is in the
// cluster, and as what, is in the managers' node list, of which every node has a
// copy with the raft index it was read at. The serial number of a certificate is
// the raft index it was signed at. So of a certificate whose holder is not on the
// list it is known, without clocks and without a list of all that were ever
// removed, what it means: signed before the list was read, its holder was
// removed; signed later, it is newer than the list. See [Standing].
//
// # Who may call
//
// [Table] names for every RPC who may make it. What it does not name, nobody may.
package peer
