package spec

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Orders of an update: which of a slot's two tasks begins or ends first.
const (
	StartFirst = "start-first"
	StopFirst  = "stop-first"
)

// What an update does that fails too often.
const (
	FailurePause    = "pause"
	FailureContinue = "continue"
	FailureRollback = "rollback"
)

// DefaultMonitor is Docker's: how long a new task is watched for a failure.
const DefaultMonitor = 5 * time.Second

// UpdateConfig tells how the tasks of a service are replaced when it changes.
type UpdateConfig struct {
	// Parallelism is how many slots are replaced at a time; 0: all.
	Parallelism     int           `json:"parallelism,omitempty" level:"2"`
	Delay           time.Duration `json:"delay,omitempty" level:"2"`   // between a slot and the next
	Monitor         time.Duration `json:"monitor,omitempty" level:"2"` // 0: DefaultMonitor
	MaxFailureRatio float64       `json:"max_failure_ratio,omitempty" level:"2"`
	FailureAction   string        `json:"failure_action,omitempty" level:"2"` // empty: FailurePause
	Order           string        `json:"order,omitempty" level:"2"`          // empty: StartFirst
}

// Policy is u with its defaults: Docker's, but for the order. Docker stops the old
// task first, and with it some requests; here the new one starts first.
func (u *UpdateConfig) Policy() UpdateConfig {
	if u == nil {
		u = &UpdateConfig{Parallelism: 1}
	}
	out := *u
	if out.Monitor == 0 {
		out.Monitor = DefaultMonitor
	}
	if out.FailureAction == "" {
		out.FailureAction = FailurePause
	}
	if out.Order == "" {
		out.Order = StartFirst
	}
	return out
}

func (u *UpdateConfig) clone() *UpdateConfig {
	if u == nil {
		return nil
	}
	out := *u
	return &out
}

// FailureActions are what can be done when an update, or a rollback, fails.
func FailureActions(kind string) []string {
	actions := []string{FailurePause, FailureContinue}
	if kind == "update" {
		actions = append(actions, FailureRollback)
	}
	return actions
}

// validate names what is wrong by its flag, without the word update or rollback.
func (u *UpdateConfig) validate(kind string) error {
	if u == nil {
		return nil
	}
	actions := FailureActions(kind)
	switch {
	case u.Parallelism < 0:
		return fmt.Errorf("%s parallelism %d is negative: use 1 and up, or 0 for all at once", kind, u.Parallelism)
	case u.Delay < 0:
		return fmt.Errorf("%s delay %s is negative", kind, u.Delay)
	case u.Monitor < 0:
		return fmt.Errorf("%s monitor %s is negative", kind, u.Monitor)
	case u.Delay%time.Millisecond != 0 || u.Monitor%time.Millisecond != 0:
		return fmt.Errorf("%s delay and monitor: use whole milliseconds", kind)
	case !(u.MaxFailureRatio >= 0 && u.MaxFailureRatio <= 1): // not a number, too
		return fmt.Errorf("%s max failure ratio %v: use 0 to 1", kind, u.MaxFailureRatio)
	case u.FailureAction != "" && !slices.Contains(actions, u.FailureAction):
		return fmt.Errorf("%s failure action %q: use %s", kind, u.FailureAction, strings.Join(actions, ", "))
	case u.Order != "" && u.Order != StartFirst && u.Order != StopFirst:
		return fmt.Errorf("%s order %q: use %s or %s", kind, u.Order, StartFirst, StopFirst)
	}
	return nil
}

// States of an update, in Docker's words.
const (
	Updating          = "updating"
	UpdatePaused      = "paused"
	UpdateCompleted   = "completed"
	RollbackStarted   = "rollback_started"
	RollbackPaused    = "rollback_paused"
	RollbackCompleted = "rollback_completed"
)

// UpdateStatus tells how far an update is. Of a service that was changed without a
// task to replace there is none.
type UpdateStatus struct {
	State       string `json:"state,omitempty" level:"2"`
	StartedAt   int64  `json:"started_at,omitempty" level:"2"` // Unix milliseconds, like CompletedAt
	CompletedAt int64  `json:"completed_at,omitempty" level:"2"`
	Message     string `json:"message,omitempty" level:"2"`
	// Since is the number of the last task that was made before it, of the managers' own
	// count: clocks of leaders differ. 0: not noted.
	Since uint64 `json:"since,omitempty" level:"4"`
}

// Active tells whether tasks are being replaced.
func (u *UpdateStatus) Active() bool {
	return u != nil && (u.State == Updating || u.State == RollbackStarted)
}

// Paused tells whether some are left that were not replaced, until somebody changes
// the service again.
func (u *UpdateStatus) Paused() bool {
	return u != nil && (u.State == UpdatePaused || u.State == RollbackPaused)
}

// Back tells whether it is a rollback.
func (u *UpdateStatus) Back() bool { return u != nil && strings.HasPrefix(u.State, "rollback") }
