package state

import (
	"errors"
	"fmt"
	"strings"
)

// Kinds of refusal, to be asked for with [errors.Is]; control maps them to RPC
// codes. The text of an error is meant for the user as it is.
var (
	ErrNotFound  = errors.New("not found")
	ErrExists    = errors.New("exists already")
	ErrInUse     = errors.New("in use")
	ErrInvalid   = errors.New("invalid")
	ErrExhausted = errors.New("exhausted")
	// ErrEnding is an ErrInUse by something that is being removed: trying again
	// helps.
	ErrEnding   = errors.New("in use by what is being removed")
	ErrConflict = errors.New("changed meanwhile") // UpdateService.Version is not the service's
	// ErrLevel: a manager, or a node, has too low a feature level. An upgrade helps.
	ErrLevel = errors.New("the feature level is too low")
)

// refusal is an error of one of the kinds above whose text does not repeat the
// kind.
type refusal struct {
	kind error
	err  error
}

func (e *refusal) Error() string   { return e.err.Error() }
func (e *refusal) Unwrap() []error { return []error{e.kind, e.err} }

// Is makes an ErrEnding an ErrInUse, too.
func (e *refusal) Is(target error) bool { return e.kind == ErrEnding && target == ErrInUse }

func failf(kind error, format string, args ...any) error {
	return &refusal{kind, fmt.Errorf(format, args...)}
}

// NotFoundError tells that a ref names nothing.
type NotFoundError struct {
	Kind string // network, service, task, node
	Ref  string
}

func (e *NotFoundError) Error() string {
	s := fmt.Sprintf("no such %s: %s", e.Kind, e.Ref)
	if cmd, ok := map[string]string{"network": "net ls", "service": "svc ls", "task": "ps -a", "node": "node ls"}[e.Kind]; ok {
		s += ": 'shoal " + cmd + "' lists all of them"
	}
	return s
}

// Is makes it an ErrNotFound.
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

// AmbiguousError tells that a ref names several objects.
type AmbiguousError struct {
	Kind    string
	Ref     string
	Matches []string // IDs, sorted; at most ten
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%s %s is ambiguous: it may be %s: give more of the ID", e.Kind, e.Ref, strings.Join(e.Matches, ", "))
}

// Is makes it an ErrInvalid.
func (e *AmbiguousError) Is(target error) bool { return target == ErrInvalid }
