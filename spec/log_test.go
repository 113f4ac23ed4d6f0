package spec

import (
	"strings"
	"testing"
)

func TestParseLog(t *testing.T) {
	for _, tc := range []struct {
		driver, opts string
		want         LogConfig
		wrong        string
	}{
		{"", "", LogConfig{}, ""},
		{"json-file", "max-size=10m max-file=5", LogConfig{"json-file", 10 << 20, 5}, ""},
		{"local", "max-file=1", LogConfig{"local", 0, 1}, ""},
		{"", "max-size=1 max-size=2g", LogConfig{"", 2 << 30, 0}, ""},
		{"syslog", "", LogConfig{}, `log driver "syslog"`},
		{"none", "", LogConfig{}, `log driver "none"`},
		{"", "max-size", LogConfig{}, "want KEY=VALUE"},
		{"", "max-size=", LogConfig{}, "max-size="},
		{"", "max-size=0", LogConfig{}, "room for some lines"},
		{"", "max-size=1k", LogConfig{}, "log files of 1024 bytes: use"},
		{"", "max-size=9999999t", LogConfig{}, "max-size"},
		{"", "max-size=-1", LogConfig{}, "max-size=-1"},
		{"", "max-file=0", LogConfig{}, "1 to 1000"},
		{"", "max-file=1001", LogConfig{}, "1001 log files"},
		{"", "max-file=x", LogConfig{}, "want a number of files"},
		{"", "compress=true", LogConfig{}, "there are max-size and max-file"},
	} {
		got, err := ParseLog(tc.driver, strings.Fields(tc.opts))
		switch {
		case tc.wrong != "":
			if err == nil || !strings.Contains(err.Error(), tc.wrong) {
				t.Errorf("%s %s: %v, want %q", tc.driver, tc.opts, err, tc.wrong)
			}
		case err != nil || got != tc.want:
			t.Errorf("%s %s: %+v, %v", tc.driver, tc.opts, got, err)
		}
	}
	for _, tc := range []struct {
		c     LogConfig
		size  int64
		files int
	}{
		{LogConfig{}, DefaultLogSize, DefaultLogFiles},
		{LogConfig{Files: 1}, DefaultLogSize, 1},
		{LogConfig{Size: -1, Files: 7}, DefaultLogSize, DefaultLogFiles},
		{LogConfig{Driver: "syslog", Size: 1 << 20, Files: 7}, DefaultLogSize, DefaultLogFiles},
	} {
		if size, files := tc.c.Limits(); size != tc.size || files != tc.files {
			t.Errorf("%+v: %d files of %d", tc.c, files, size)
		}
	}
	if s := (LogConfig{Size: MinLogSize, Files: 2}).String(); s != "max-file=2 max-size=65536" {
		t.Error(s)
	}
}
