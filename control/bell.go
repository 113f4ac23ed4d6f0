package control

// bell tells who waits that something is new. It is taken before one looks, and is
// closed, and another in its place, when there is more; both under the lock of what
// it is about.
type bell chan struct{}

func (b *bell) ring() {
	close(*b)
	*b = make(bell)
}
