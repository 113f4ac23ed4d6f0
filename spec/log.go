package spec

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Defaults and bounds of LogConfig. The defaults are 30 MB a task, rather than Docker's
// one file without a bound, which fills disks.
const (
	DefaultLogSize  = 10 << 20
	DefaultLogFiles = 3
	MinLogSize      = 4 * MaxLogLine
	MaxLogSize      = 1 << 40
	MaxLogFiles     = 1000
)

// LogConfig is how a node keeps a task's output: in Files files of Size bytes, of which
// the oldest is dropped for another. 0: the default.
type LogConfig struct {
	// Driver is the word that was typed, of Docker's for files on the node: json-file or
	// local. They make no difference.
	Driver string `json:"driver,omitempty" level:"3"`
	Size   int64  `json:"size,omitempty" level:"3"`
	Files  int    `json:"files,omitempty" level:"3"`
}

// ParseLog reads Docker's --log-driver and --log-opt KEY=VALUE.
func ParseLog(driver string, opts []string) (LogConfig, error) {
	c := LogConfig{Driver: driver}
	for _, o := range opts {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			return LogConfig{}, fmt.Errorf("log option %q: want KEY=VALUE, such as max-size=10m", o)
		}
		switch k {
		case "max-size":
			n, err := ParseBytes(v)
			if err != nil {
				return LogConfig{}, fmt.Errorf("log option %q: %w", o, err)
			}
			if n == 0 { // which stands for the default
				return LogConfig{}, fmt.Errorf("log option %q: a file must have room for some lines: use %d bytes or more", o, MinLogSize)
			}
			c.Size = n
		case "max-file":
			n, err := strconv.Atoi(v)
			if err != nil || n < 1 {
				return LogConfig{}, fmt.Errorf("log option %q: want a number of files, 1 to %d", o, MaxLogFiles)
			}
			c.Files = n
		default:
			return LogConfig{}, fmt.Errorf("log option %q: there are max-size and max-file", o)
		}
	}
	return c, c.Validate()
}

// Validate reports the first thing wrong.
func (c LogConfig) Validate() error {
	switch {
	case c.Driver != "" && c.Driver != "json-file" && c.Driver != "local":
		return fmt.Errorf("log driver %q: output is kept in files of the node and read with 'shoal logs', as json-file and local have it: send it elsewhere from there", c.Driver)
	case c.Size != 0 && (c.Size < MinLogSize || c.Size > MaxLogSize):
		return fmt.Errorf("log files of %d bytes: use %d to %d", c.Size, MinLogSize, MaxLogSize)
	case c.Files < 0 || c.Files > MaxLogFiles:
		return fmt.Errorf("%d log files: use 1 to %d", c.Files, MaxLogFiles)
	}
	return nil
}

// Limits are the bytes of a file and the number of files, with defaults applied, also for
// what Validate refuses: an older or a damaged record.
func (c LogConfig) Limits() (size int64, files int) {
	if c.Validate() != nil {
		c = LogConfig{}
	}
	if c.Size == 0 {
		c.Size = DefaultLogSize
	}
	if c.Files == 0 {
		c.Files = DefaultLogFiles
	}
	return c.Size, c.Files
}

// Options are Docker's --log-opt, by key.
func (c LogConfig) Options() map[string]string {
	out := map[string]string{}
	if c.Size > 0 {
		out["max-size"] = strconv.FormatInt(c.Size, 10)
	}
	if c.Files > 0 {
		out["max-file"] = strconv.Itoa(c.Files)
	}
	return out
}

// String is the options for people: "max-file=3 max-size=10485760".
func (c LogConfig) String() string {
	opts := c.Options()
	var out []string
	for _, k := range slices.Sorted(maps.Keys(opts)) {
		out = append(out, k+"="+opts[k])
	}
	return strings.Join(out, " ")
}
