package spec

import (
	"strings"
	"testing"
)

func TestRestartPolicy(t *testing.T) {
	for in, wrong := range map[string]string{"sometimes": "use no, always", "always:3": "of on-failure only", "on-failure:": "like on-failure:3", "on-failure:-1": "like on-failure:3", "on-failure:x": "like on-failure:3", "no:1": "of on-failure only"} {
		if _, _, err := ParseRestart(in); err == nil || !strings.Contains(err.Error(), wrong) || !strings.Contains(err.Error(), in) {
			t.Errorf("%q: %v", in, err)
		}
	}
	for _, x := range []struct {
		policy string
		failed bool
		times  int
		want   bool
	}{
		{"", true, 0, false}, {"no", true, 0, false}, {"always", false, 0, true}, {"always", true, 1000, true}, {"unless-stopped", false, 7, true},
		{"on-failure", true, 1000, true}, {"on-failure", false, 0, false}, {"on-failure:2", true, 1, true}, {"on-failure:2", true, 2, false}, {"on-failure:0", true, 9, true}, {"nonsense", true, 0, false},
	} {
		if got := (TaskSpec{Restart: x.policy}).RestartsAfter(x.failed, x.times); got != x.want {
			t.Errorf("%+v: %t", x, got)
		}
	}
	for what, ts := range map[string]TaskSpec{"use no, always": {Command: []string{"x"}, Restart: "maybe"}, "--restart": {Command: []string{"x"}, Restart: "always", AutoRemove: true}} {
		if err := ts.Validate(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%+v: %v", ts, err)
		}
	}
	if err := (TaskSpec{Command: []string{"x"}, Restart: "no", AutoRemove: true}).Validate(); err != nil {
		t.Error(err)
	}
}
