package dns

import (
	"hash/maphash"
	"maps"
)

// shardCount is the number of maps that a table is split into: the more, the
// less is copied for one change, and the more pointers are for any change.
const shardCount = 1024

// table is an immutable map. A change, made by edit, copies the shards that it
// touches and shares the rest.
type table[K comparable, V any] struct {
	seed   maphash.Seed
	shards []map[K]V
	size   int
}

func newTable[K comparable, V any]() *table[K, V] {
	return &table[K, V]{seed: maphash.MakeSeed(), shards: make([]map[K]V, shardCount)}
}

func (t *table[K, V]) shard(k K) int { return int(maphash.Comparable(t.seed, k) % shardCount) }

func (t *table[K, V]) get(k K) (V, bool) {
	v, ok := t.shards[t.shard(k)][k]
	return v, ok
}

// edit is a table under construction, by one goroutine.
type edit[K comparable, V any] struct {
	from *table[K, V]
	to   *table[K, V] // nil: nothing has changed
	own  []bool
}

func (e *edit[K, V]) get(k K) (V, bool) {
	if e.to != nil {
		return e.to.get(k)
	}
	return e.from.get(k)
}

// writable returns the shard of k, which may be changed.
func (e *edit[K, V]) writable(k K) map[K]V {
	if e.to == nil {
		e.to = &table[K, V]{seed: e.from.seed, shards: make([]map[K]V, shardCount), size: e.from.size}
		copy(e.to.shards, e.from.shards)
		e.own = make([]bool, shardCount)
	}
	i := e.from.shard(k)
	if !e.own[i] {
		e.own[i] = true
		if e.to.shards[i] == nil {
			e.to.shards[i] = map[K]V{}
		} else {
			e.to.shards[i] = maps.Clone(e.to.shards[i])
		}
	}
	return e.to.shards[i]
}

func (e *edit[K, V]) set(k K, v V) {
	m := e.writable(k)
	n := len(m)
	m[k] = v
	e.to.size += len(m) - n
}

func (e *edit[K, V]) del(k K) {
	m := e.writable(k)
	n := len(m)
	delete(m, k)
	e.to.size += len(m) - n
}

// done returns the result; the edit must not be used again.
func (e *edit[K, V]) done() *table[K, V] {
	if e.to == nil {
		return e.from
	}
	return e.to
}
