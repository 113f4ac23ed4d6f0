package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// momentForms are Docker's forms of a date and time.
var momentForms = []string{
	time.RFC3339Nano, "2006-01-02T15:04Z07:00", "2006-01-02T15Z07:00", "2006-01-02Z07:00",
	"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02", "2006-01-02 15:04:05",
}

// moment reads Docker's forms of a time: a duration before now, seconds since 1970 with nine places at most, a date, or a date and time.
// Without a zone the time is this machine's.
func moment(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, ok := unixMoment(s); ok {
		return t, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, form := range momentForms {
		if t, err := time.ParseInLocation(form, s, time.Local); err == nil && inUnixNano(t) {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time: want how long ago, like 10m, or a moment, like 2006-01-02T15:04:05 or seconds since 1970", s)
}

// unixMoment reads seconds since 1970, to the nanosecond.
func unixMoment(s string) (time.Time, bool) {
	whole, part, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseUint(whole, 10, 63)
	if err != nil || len(part) > 9 {
		return time.Time{}, false
	}
	ns, err := strconv.ParseUint((part + "000000000")[:9], 10, 63)
	if t := time.Unix(int64(sec), int64(ns)); err == nil && inUnixNano(t) {
		return t, true
	}
	return time.Time{}, false
}

// inUnixNano tells whether a time has a number of nanoseconds since 1970.
func inUnixNano(t time.Time) bool {
	return t.Unix() >= 0 && t.Unix() < math.MaxInt64/int64(time.Second)
}
