package main

import (
	"cmp"
	"errors"

	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// healthFlags are Docker's --health-…; what is zero was not given.
type healthFlags struct {
	spec.HealthCheck
	none bool
}

func (h *healthFlags) add(f *pflag.FlagSet) {
	f.StringVar(&h.Command, "health-cmd", "", "shell command run in the task that tells, by status 0, whether it can serve")
	f.DurationVar(&h.Interval, "health-interval", 0, "time between checks (default 30s)")
	f.DurationVar(&h.Timeout, "health-timeout", 0, "time that a check may take (default 30s)")
	f.IntVar(&h.Retries, "health-retries", 0, "failures in a row that make it unhealthy (default 3)")
	f.DurationVar(&h.StartPeriod, "health-start-period", 0, "time to start in, in which failures don't count")
	f.DurationVar(&h.StartInterval, "health-start-interval", 0, "time between checks until the first success (default 1s)")
	f.BoolVar(&h.none, "no-healthcheck", false, "no health check")
}

// apply is the health check of a task that had have (nil: none).
func (h *healthFlags) apply(have *shoalv1.HealthCheck) (*shoalv1.HealthCheck, error) {
	given := h.Command != "" || h.Interval != 0 || h.Timeout != 0 || h.Retries != 0 || h.StartPeriod != 0 || h.StartInterval != 0
	switch {
	case h.none && given:
		return nil, errors.New("--no-healthcheck goes with no other --health flag")
	case h.none:
		return nil, nil
	case !given:
		return have, nil
	}
	var was spec.HealthCheck
	if have != nil {
		was = *api.ToHealthCheck(have)
	}
	is := spec.HealthCheck{
		Command: cmp.Or(spec.Text(h.Command), was.Command), Interval: cmp.Or(h.Interval, was.Interval), Timeout: cmp.Or(h.Timeout, was.Timeout),
		StartPeriod: cmp.Or(h.StartPeriod, was.StartPeriod), StartInterval: cmp.Or(h.StartInterval, was.StartInterval), Retries: cmp.Or(h.Retries, was.Retries),
	}
	if err := is.Validate(); err != nil {
		return nil, err
	}
	return api.HealthCheck(&is), nil
}
