package spec

import (
	"fmt"
	"strconv"
	"strings"
)

// Restart policies of tasks of their own, in Docker's words (docker run --restart):
// after which ends of its program the node starts it again, in its place. RestartOnFailure
// is one, too, and may have a number of attempts behind a colon.
const (
	RestartNo            = "no"
	RestartAlways        = "always"
	RestartUnlessStopped = "unless-stopped" // RestartAlways is the same here: what was stopped stays so
)

// ParseRestart reads a restart policy; most is how many attempts it allows, 0: any.
func ParseRestart(s string) (policy string, most int, err error) {
	policy, number, given := strings.Cut(s, ":")
	switch policy {
	case "", RestartNo, RestartAlways, RestartUnlessStopped, RestartOnFailure:
	default:
		return "", 0, fmt.Errorf("restart policy %q: use %s, %s, %s or %s[:ATTEMPTS]", s, RestartNo, RestartAlways, RestartUnlessStopped, RestartOnFailure)
	}
	if !given {
		return policy, 0, nil
	}
	if policy != RestartOnFailure {
		return "", 0, fmt.Errorf("restart policy %q: attempts are counted of %s only", s, RestartOnFailure)
	}
	if most, err = strconv.Atoi(number); err != nil || most < 0 {
		return "", 0, fmt.Errorf("restart policy %q: want a number of attempts, like %s:3", s, RestartOnFailure)
	}
	return policy, most, nil
}

// RestartsAfter tells whether a task's program is started again, when it has been so many
// times before, and has failed or not.
func (t TaskSpec) RestartsAfter(failed bool, times int) bool {
	policy, most, err := ParseRestart(t.Restart)
	switch {
	case err != nil:
		return false
	case policy == RestartOnFailure:
		return failed && (most == 0 || times < most)
	}
	return policy == RestartAlways || policy == RestartUnlessStopped
}
