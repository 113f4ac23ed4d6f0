package spec

import (
	"reflect"
	"strings"
	"testing"
)

func TestValidateImage(t *testing.T) {
	for _, ok := range []string{"nginx", "nginx:1.27", "library/nginx", "localhost:5000/a/b:c", "r.example.com/x@sha256:" + strings.Repeat("a", 64), "[::1]:5000/x", "a__b/c-d"} {
		if err := ValidateImage(ok); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
	for bad, want := range map[string]string{"": "no image", "/bin/sleep": "after --", "./x": "after --", "Nginx": "small letters", "a b": "reference", "nginx:": "reference", "-x": "reference", "x@sha256:ab": "reference"} {
		if err := ValidateImage(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", bad, err, want)
		}
	}
}

func TestParseMounts(t *testing.T) {
	for _, c := range []struct {
		fn   func(string) (Mount, error)
		in   string
		want Mount
		err  string
	}{
		{ParseMount, "type=bind,src=/a,dst=/b,ro", Mount{Type: MountBind, Source: "/a", Target: "/b", ReadOnly: true}, ""},
		{ParseMount, "source=data,target=/d,volume-nocopy", Mount{Type: MountVolume, Source: "data", Target: "/d", NoCopy: true}, ""},
		{ParseMount, "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700", Mount{Type: MountTmpfs, Target: "/t", Size: 1 << 20, Mode: 0o700}, ""},
		{ParseMount, "type=bind,src=a,dst=/b", Mount{}, "absolute path"},
		{ParseMount, "type=nfs,dst=/b", Mount{}, "use bind, volume or tmpfs"},
		{ParseMount, "type=volume", Mount{}, "no target"},
		{ParseMount, "dst=/", Mount{}, "container itself"},
		{ParseMount, "dst=/x,colour=red", Mount{}, "colour"},
		{ParseVolume, "/data", Mount{Type: MountVolume, Target: "/data"}, ""},
		{ParseVolume, "/h:/c:ro,rslave", Mount{Type: MountBind, Source: "/h", Target: "/c", ReadOnly: true, Propagation: "rslave", CreateSrc: true}, ""},
		{ParseVolume, "name:/c", Mount{Type: MountVolume, Source: "name", Target: "/c"}, ""},
		{ParseVolume, "a:b:c:d", Mount{}, "want"},
		{ParseVolume, "x:/c", Mount{}, "two or more"},
		{ParseTmpfs, "/run:size=64k,exec", Mount{Type: MountTmpfs, Target: "/run", Size: 64 << 10, Options: []string{"exec"}}, ""},
		{ParseTmpfs, "run", Mount{}, "absolute"},
	} {
		got, err := c.fn(c.in)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.in, err, c.err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v; want %+v", c.in, got, err, c.want)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "1": 1, "64m": 64 << 20, "64MB": 64 << 20, "1.5g": 3 << 29, "2kib": 2048, "-1": -1, "x": -1, "": -1, "1e30": -1, "9999999999t": -1} {
		got, err := ParseBytes(in)
		if want < 0 != (err != nil) || err == nil && got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestContainerNeedsImage(t *testing.T) {
	for _, c := range []Container{{ReadOnly: true}, {Entrypoint: []string{"x"}}, {Mounts: []Mount{{Type: MountTmpfs, Target: "/x"}}}, {CapAdd: []string{"NET_ADMIN"}}, {Init: true}} {
		if err := (TaskSpec{Command: []string{"true"}, Container: c}).Validate(); err == nil || !strings.Contains(err.Error(), "needs an image") {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, c := range []Container{{Image: "x", Ulimits: []string{"nofile=9:3"}}, {Image: "x", Sysctls: map[string]string{"vm.swappiness": "1"}}, {Image: "x", Devices: []string{"null"}}, {Image: "x", SecurityOpt: []string{"selinux"}},
		{Image: "x", Mounts: []Mount{{Type: MountTmpfs, Target: "/x"}, {Type: MountTmpfs, Target: "/x/"}}}} {
		if err := (TaskSpec{Container: c}).Validate(); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}
