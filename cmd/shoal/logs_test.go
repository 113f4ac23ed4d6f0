package main

import (
	"testing"
	"time"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

func TestTail(t *testing.T) {
	for in, want := range map[string]int32{"all": 0, "-1": 0, "-7": 0, "0": -1, "1": 1, "25": 25, "99999999999": 1<<31 - 1} {
		var got tail
		if err := got.Set(in); err != nil || int32(got) != want {
			t.Errorf("--tail %s: %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "1.5", "ALL", "1 2"} {
		var got tail
		if err := got.Set(in); err == nil {
			t.Errorf("--tail %q is %d", in, got)
		}
	}
}

func TestMoment(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 123456789, time.UTC)
	local := func(y, m, d, h, min, s int) time.Time {
		return time.Date(y, time.Month(m), d, h, min, s, 0, time.Local)
	}
	for in, want := range map[string]time.Time{
		"10m": now.Add(-10 * time.Minute), "1h30m": now.Add(-90 * time.Minute), "0s": now, "1.5h": now.Add(-90 * time.Minute),
		"0": time.Unix(0, 0), "1136073845": time.Unix(1136073845, 0), "1136073845.000000001": time.Unix(1136073845, 1), "1136073845.5": time.Unix(1136073845, 500e6),
		"2026-01-02": local(2026, 1, 2, 0, 0, 0), "2026-01-02T15": local(2026, 1, 2, 15, 0, 0), "2026-01-02T15:04": local(2026, 1, 2, 15, 4, 0), "2026-01-02T15:04:05": local(2026, 1, 2, 15, 4, 5),
		"2026-01-02T15:04:05.000000007":       local(2026, 1, 2, 15, 4, 5).Add(7),
		"2026-01-02T15:04:05Z":                time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC),
		"2026-01-02T15:04:05.123456789+02:00": time.Date(2026, 1, 2, 13, 4, 5, 123456789, time.UTC),
		"2026-01-02Z":                         time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC),
	} {
		if got, err := moment(in, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"yesterday", "2026-13-01", "10", "1e9", "1136073845.1234567891", "99999999999999999999", "2026-01-02T", "9999-01-01", "-1", "-5s"} {
		if in == "10" {
			continue // seconds since 1970
		}
		if got, err := moment(in, now); err == nil {
			t.Errorf("%s is %v", in, got)
		}
	}
}

func TestLogLine(t *testing.T) {
	task := &shoalv1.Task{Id: "abcdefabcdef", Name: "web.1.abcdefabcdef", Service: "serviceid123", Slot: 1, Node: "nodeid123456", Spec: &shoalv1.TaskSpec{Labels: map[string]string{"a": "b c", "z": "1"}}}
	m := &shoalv1.LogsResponse{AtNs: time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC).UnixNano(), Line: []byte("hello")}
	names := map[string]string{"nodeid123456": "node1"}
	for want, lf := range map[string]logFlags{
		"hello\n":                                            {},
		"2026-01-02T03:04:05.000000600Z hello\n":             {timestamps: true},
		"a=b+c,z=1 hello\n":                                  {details: true},
		"web.1.abcdefabcdef@node1 | hello\n":                 {prefix: true},
		"web.1@node1 | hello\n":                              {prefix: true, noTaskIDs: true},
		"serviceid123.1.abcdefabcdef@nodeid123456 | hello\n": {prefix: true, noResolve: true},
		"serviceid123.1@nodeid123456 | hello\n":              {prefix: true, noResolve: true, noTaskIDs: true},
		"2026-01-02T03:04:05.000000600Z web.1@node1 | a=b+c,tier=x,z=1 hello\n": {prefix: true, timestamps: true, noTaskIDs: true, details: true, labels: map[string]string{"tier": "x", "z": "0"}},
	} {
		lf.names = names
		if got := string(lf.line(task, m)); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
