package spec

import (
	"fmt"
	"strings"
	"time"
)

// HealthCheck is a command, run inside the task, whose exit status tells whether
// the task can serve: 0 it can. The words and defaults are Docker's.
type HealthCheck struct {
	Command       string        `json:"command"`        // for /bin/sh -c
	Exec          []string      `json:"exec,omitempty"` // run as it is, instead of Command (an image's CMD form)
	Interval      time.Duration `json:"interval,omitempty"`
	Timeout       time.Duration `json:"timeout,omitempty"`        // of one check, which then counts as failed
	StartPeriod   time.Duration `json:"start_period,omitempty"`   // failures in it don't count
	StartInterval time.Duration `json:"start_interval,omitempty"` // until the first success
	Retries       int           `json:"retries,omitempty"`        // failures in a row that make it unhealthy
	Disabled      bool          `json:"disabled,omitempty"`       // none, whatever the image says
}

// Defaults of a HealthCheck: Docker's, but for the interval until the first
// success, 5 s there: a replica takes no traffic before.
const (
	DefaultHealthInterval      = 30 * time.Second
	DefaultHealthTimeout       = 30 * time.Second
	DefaultHealthStartInterval = time.Second
	DefaultHealthRetries       = 3
)

// minHealth is the least of a HealthCheck's durations, as in Docker.
const minHealth = time.Millisecond

// WithDefaults returns h with its defaults filled in.
func (h HealthCheck) WithDefaults() HealthCheck {
	if h.Interval == 0 {
		h.Interval = DefaultHealthInterval
	}
	if h.Timeout == 0 {
		h.Timeout = DefaultHealthTimeout
	}
	if h.StartInterval == 0 {
		h.StartInterval = min(DefaultHealthStartInterval, h.Interval)
	}
	if h.Retries == 0 {
		h.Retries = DefaultHealthRetries
	}
	return h
}

// Patience is how long a task may take until its first success: as long as
// Docker's checks would take to fail.
func (h HealthCheck) Patience() time.Duration {
	h = h.WithDefaults()
	return h.StartPeriod + time.Duration(h.Retries)*h.Interval
}

// Validate reports the first thing wrong.
func (h HealthCheck) Validate() error {
	if h.Disabled || len(h.Exec) > 0 {
		return nil
	}
	if strings.TrimSpace(h.Command) == "" {
		return fmt.Errorf("health check: no command: give one with --health-cmd, like 'curl -fs http://localhost/'")
	}
	if strings.ContainsRune(h.Command, 0) {
		return fmt.Errorf("health check: command %q holds a NUL byte", h.Command)
	}
	for _, d := range []struct {
		what string
		d    time.Duration
	}{{"interval", h.Interval}, {"timeout", h.Timeout}, {"start period", h.StartPeriod}, {"start interval", h.StartInterval}} {
		if d.d != 0 && d.d < minHealth {
			return fmt.Errorf("health check: %s %s is too short: use %s or more", d.what, d.d, minHealth)
		}
	}
	if h.Retries < 0 {
		return fmt.Errorf("health check: %d retries: use 1 or more", h.Retries)
	}
	return nil
}

// What a health check says of a task, in Docker's words.
const (
	HealthStarting  = "starting"
	HealthHealthy   = "healthy"
	HealthUnhealthy = "unhealthy"
)

// Healths are the words for a task's health.
func Healths() []string { return []string{HealthStarting, HealthHealthy, HealthUnhealthy} }

// Unhealthy begins the message of a task whose health check has failed for too long.
const Unhealthy = HealthUnhealthy + ": "
