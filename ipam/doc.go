// Package ipam allocates subnets from pools and addresses from subnets. It is
// pure: what is taken, and where the last search ended, is passed in or kept in
// a [Space] that its caller owns, so that the same calls in the same order give
// the same addresses on every manager.
//
// Both searches are next-fit: they go on behind the last allocation and wrap.
// First-fit would hand an address out again the moment it is freed, while
// caches (a client's DNS answer, a neighbour's connection) still point at its
// last holder; next-fit lets the whole range pass first. It costs one cursor
// per range, which is part of the state.
//
// [NextSubnet] looks at the taken prefixes as sorted intervals and jumps over
// them, so that a pool of which a host route takes half costs one step, not
// thousands.
//
// A [Space] is a bitmap in pages of 4096 addresses, each with a count, so that a
// search skips a full page in one step and a full word of 64 in another, and an
// empty IPv6 range costs nothing. A /16 with all addresses but one taken answers
// in under a microsecond. Tried before: a sorted list of holes (as fast, but
// O(n) to rebuild at a restore in random order, and harder to believe) and
// probing a map of used addresses (O(n) per allocation near exhaustion).
//
// Next-fit never looks further than [Window] addresses into a range: a /8 has no
// more, and of an IPv6 /64 the virtual addresses must differ in their low 24 bits
// (spec.Network.VIPMark). An address beyond may still be asked for by name.
package ipam
