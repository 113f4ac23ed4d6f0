// Package gossip tells every node which nodes live and where every endpoint is.
// It is the only importer of hashicorp/memberlist.
//
// # What is built on what
//
//	Snapshot  ◄── members (liveness)  ◄── memberlist: SWIM probes, suspicion, Lifeguard
//	   ▲                              ◄── detector: a direct ping to each peer, 4 a second
//	   └───────── records (endpoints) ◄── direct deltas, rumours, digests and fetches
//
// memberlist decides who is a member and who is dead. The endpoint table is
// ours: one record per node, {epoch, seq, key → entry{seq, endpoint or
// tombstone}}, written by that node alone. The highest (epoch, seq) wins, a
// higher epoch replaces all of a lower one, and no node ever writes or repairs
// another's record, so there is nothing to merge; and its signature tells that it
// is the node's. The epoch is a counter on disk that goes up at each [Open]; it
// spares us keeping the sequence on disk. A node that meets a newer record of
// itself (its disk was lost) moves its epoch past it and publishes anew.
//
// # How a change travels
//
//  1. [Gossip.SetEndpoints] diffs the set against the record and makes a delta
//     (node, epoch, prev → seq, changes).
//  2. The delta goes at once, in one UDP packet, to every peer (to a random
//     [Tuning.DirectPeers] of them in a larger cluster); over TCP if it does
//     not fit one packet. This is what makes a change known in milliseconds;
//     memberlist alone would take some gossip intervals.
//  3. It also enters the rumour queue, which rides memberlist's gossip packets
//     and pings; whoever learns something from a delta queues it too. Own and
//     relayed rumours have a queue each, own first, as NetworkDB's single queue
//     starved a node's own events. What can't fit a packet never enters.
//  4. A receiver that misses what came before (memberlist handles packets last
//     in, first out, and UDP loses some) parks the delta for some milliseconds
//     and then fetches the rest from the owner, or from whoever sent it.
//  5. Every [Tuning.DigestInterval] a node compares digests (node, epoch, seq,
//     hash) with one random peer, and each fetches what it lacks. memberlist's
//     push/pull carries the same digest, never the table: NetworkDB's full
//     tables hit memberlist's size limit at 21 nodes (moby#41416).
//
// Steps 2 and 3 are best effort and may drop; 4 and 5 make it certain.
//
// A deletion is a tombstone so that step 4 can send only what is newer. They
// are bounded in count and age; a fetch from before the oldest dropped one gets
// the whole set, which replaces.
//
// A new process of the same node says nothing before its first SetEndpoints, so
// that an agent's restart under living tasks does not blank its endpoints: the
// others keep the record of the last epoch until then.
//
// # Liveness
//
// memberlist is tuned to declare a dead node dead after some three seconds
// (config.go says why not sooner). A direct ping four times a second finds it
// suspect after half a second. Suspect is advice; dead takes the endpoints out
// of the [Snapshot]. The record stays and is back at once when the node is.
// memberlist probes one node at a time; so what has answered none of our pings for
// a second is suspected through it too (wall.accuse), that the deaths of many at
// once are found at once.
//
// memberlist's verdict may come from another node's bad link. While the accused
// still answers our own pings it is held suspect and its endpoints stay: never
// empty a VIP on gossip alone while the node behind it answers.
//
// memberlist forgets the dead after a while and never calls them again, so
// partitions would stay for ever; and a node declared left or dead can't tell
// from its own side. Two things mend this: a durable list of peer addresses,
// those without a living member tried for ever, and a flag in every digest
// reply, "I don't hold you for a living member", which makes the asker join
// again.
//
// # Trust
//
// Who is a node, where, and which key it signs with, the managers say
// ([Directory]); before they have, nobody is heard. All frames are sealed with a
// key of the cluster (seal.go), which keeps strangers out and gives no authority:
// a node signs its record and its metadata (trust.go), and what memberlist must
// believe unsigned is bounded (wall.go). A record may come before the managers
// have told of its node. It is dropped then, and fetched when they do: the node
// is called at once, and the digests that this brings name what is missing. Of
// what is signed each node keeps the bytes, so that whoever passes it on can only
// pass on what was signed, with the fields that he does not know.
//
// Not checked here is whether the managers gave a task and its address to the node
// that says it has them: no node is told of the tasks of all others. Who uses the
// endpoints asks the managers (agent/claims.go).
//
// # Locks
//
// memberlist calls our delegates with its node lock held, and they take
// Gossip.mu. Hence nothing here may call memberlist under Gossip.mu: what is to
// be sent is collected and sent after unlocking.
package gossip
