package spec

import (
	"encoding/csv"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Container is what a task from an image has beyond any task. Every field may be
// left at its zero value: then the image, or Docker's default, counts.
type Container struct {
	Image string `json:"image,omitempty"` // reference, with a digest once it is pinned; empty: a program of the node
	// Entrypoint goes before the command; nil: the image's. One empty string: none.
	Entrypoint []string `json:"entrypoint,omitempty"`
	Pull       string   `json:"pull,omitempty"` // PullMissing ("") and so on
	// RegistryAuth is what the registry asks for, as Docker's X-Registry-Auth
	// (base64 of JSON). It is never given out again.
	RegistryAuth string `json:"registry_auth,omitempty"`

	Mounts      []Mount           `json:"mounts,omitempty"`
	ReadOnly    bool              `json:"read_only,omitempty"` // the root file system
	Privileged  bool              `json:"privileged,omitempty"`
	CapAdd      []string          `json:"cap_add,omitempty"` // NET_ADMIN, or ALL
	CapDrop     []string          `json:"cap_drop,omitempty"`
	SecurityOpt []string          `json:"security_opt,omitempty"` // seccomp=unconfined, no-new-privileges, …
	Devices     []string          `json:"devices,omitempty"`      // HOST[:CONTAINER[:rwm]]
	ShmSize     int64             `json:"shm_size,omitempty"`     // of /dev/shm, bytes; 0: 64 MiB
	Ulimits     []string          `json:"ulimits,omitempty"`      // NAME=SOFT[:HARD]
	Sysctls     map[string]string `json:"sysctls,omitempty"`      // of the task's own namespaces
	Groups      []string          `json:"groups,omitempty"`       // further groups of the user
	Init        bool              `json:"init,omitempty"`         // an init reaps what the program leaves behind
}

// When an image is fetched, in the words of docker run --pull.
const (
	PullMissing = "missing" // when the node does not have it
	PullAlways  = "always"
	PullNever   = "never"
)

// Mount is one thing mounted in a container.
type Mount struct {
	Type        string            `json:"type"`             // MountBind, …
	Source      string            `json:"source,omitempty"` // path on the node, or name of a volume; empty: a volume without a name
	Target      string            `json:"target"`           // absolute path in the container
	ReadOnly    bool              `json:"read_only,omitempty"`
	NoCopy      bool              `json:"no_copy,omitempty"`     // a new volume starts empty, not with what the image has there
	Propagation string            `json:"propagation,omitempty"` // of a bind; empty: rprivate
	CreateSrc   bool              `json:"create_src,omitempty"`  // make a bind's source a directory if it is not there (-v does)
	Size        int64             `json:"size,omitempty"`        // of a tmpfs, bytes; 0: no limit
	Mode        uint32            `json:"mode,omitempty"`        // of a tmpfs; 0: 1777
	Options     []string          `json:"options,omitempty"`     // further mount options of a tmpfs
	Driver      string            `json:"driver,omitempty"`      // of a volume; empty: local
	Labels      map[string]string `json:"labels,omitempty"`      // of a volume that is made
}

// Types of mounts, in Docker's words.
const (
	MountBind   = "bind"
	MountVolume = "volume"
	MountTmpfs  = "tmpfs"
)

func (c Container) clone() Container {
	c.Entrypoint, c.CapAdd, c.CapDrop = slices.Clone(c.Entrypoint), slices.Clone(c.CapAdd), slices.Clone(c.CapDrop)
	c.SecurityOpt, c.Devices, c.Ulimits, c.Groups = slices.Clone(c.SecurityOpt), slices.Clone(c.Devices), slices.Clone(c.Ulimits), slices.Clone(c.Groups)
	c.Sysctls = cloneMap(c.Sysctls)
	c.Mounts = slices.Clone(c.Mounts)
	for i := range c.Mounts {
		c.Mounts[i].Options, c.Mounts[i].Labels = slices.Clone(c.Mounts[i].Options), cloneMap(c.Mounts[i].Labels)
	}
	return c
}

func cloneMap(m map[string]string) map[string]string {
	if m == nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// onlyImages names the first field set that needs an image.
func (c Container) onlyImages() string {
	switch {
	case len(c.Entrypoint) > 0:
		return "--entrypoint"
	case c.Pull != "":
		return "--pull"
	case len(c.Mounts) > 0:
		return "--mount (or --volume, --tmpfs)"
	case c.ReadOnly:
		return "--read-only"
	case c.Privileged:
		return "--privileged"
	case len(c.CapAdd) > 0:
		return "--cap-add"
	case len(c.CapDrop) > 0:
		return "--cap-drop"
	case len(c.SecurityOpt) > 0:
		return "--security-opt"
	case len(c.Devices) > 0:
		return "--device"
	case c.ShmSize != 0:
		return "--shm-size"
	case len(c.Ulimits) > 0:
		return "--ulimit"
	case len(c.Sysctls) > 0:
		return "--sysctl"
	case len(c.Groups) > 0:
		return "--group"
	case c.Init:
		return "--init"
	}
	return ""
}

// validate reports the first thing wrong.
func (c Container) validate() error {
	if c.Image == "" {
		if f := c.onlyImages(); f != "" {
			return fmt.Errorf("%s needs an image: a program of the node has the node's own file system", f)
		}
		return nil
	}
	if err := ValidateImage(c.Image); err != nil {
		return err
	}
	switch c.Pull {
	case "", PullMissing, PullAlways, PullNever:
	default:
		return fmt.Errorf("pull policy %q: use always, missing or never", c.Pull)
	}
	for _, e := range c.Entrypoint {
		if strings.ContainsRune(e, 0) {
			return fmt.Errorf("entrypoint %q: holds a NUL byte", e)
		}
	}
	seen := map[string]bool{}
	for _, m := range c.Mounts {
		if err := m.Validate(); err != nil {
			return err
		}
		if t := path.Clean(m.Target); seen[t] {
			return fmt.Errorf("two mounts at %s: each needs a place of its own", m.Target)
		} else {
			seen[t] = true
		}
	}
	if c.ShmSize < 0 {
		return fmt.Errorf("shm size %d is negative", c.ShmSize)
	}
	for _, u := range c.Ulimits {
		if _, _, _, err := ParseUlimit(u); err != nil {
			return err
		}
	}
	for k := range c.Sysctls {
		if !strings.HasPrefix(k, "net.") && !strings.HasPrefix(k, "fs.mqueue.") && !slices.Contains(ipcSysctls, k) {
			return fmt.Errorf("sysctl %s is of the whole node: a container may set those of net.*, fs.mqueue.* and %s", k, strings.Join(ipcSysctls, ", "))
		}
	}
	for _, s := range c.SecurityOpt {
		k, v, _ := strings.Cut(strings.Replace(s, ":", "=", 1), "=")
		switch {
		case k == "no-new-privileges" && (v == "" || v == "true" || v == "false"):
		case k == "seccomp" && v == "unconfined", k == "seccomp" && strings.HasPrefix(v, "{"), k == "seccomp" && v == "builtin":
		case k == "apparmor" && v != "", k == "label", k == "systempaths" && v == "unconfined", k == "writable-cgroups":
		default:
			return fmt.Errorf("security option %q: use no-new-privileges, seccomp=unconfined, seccomp=FILE, apparmor=PROFILE, label=disable or systempaths=unconfined", s)
		}
	}
	for _, d := range c.Devices {
		if _, _, _, err := ParseDevice(d); err != nil {
			return err
		}
	}
	return nil
}

// ipcSysctls are those of the IPC namespace (ipc_namespaces(7)) and the UTS one.
var ipcSysctls = []string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced", "kernel.domainname"}

// imageRE is a reference: [HOST[:PORT]/]PATH[:TAG][@DIGEST], the grammar of
// github.com/distribution/reference.
var imageRE = regexp.MustCompile(`^(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/)?` +
	`[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*(?::[\w][\w.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{32,})?$`)

// ValidateImage reports what is wrong with the name of an image.
func ValidateImage(ref string) error {
	switch {
	case ref == "":
		return fmt.Errorf("no image is named")
	case strings.HasPrefix(ref, "/"), strings.HasPrefix(ref, "./"), strings.HasPrefix(ref, "../"):
		return fmt.Errorf("%q is a path, not an image: a program of the node goes after --, like: -- %s", ref, ref)
	case len(ref) > 255+128+72:
		return fmt.Errorf("image %q… is too long a name", ref[:40])
	case imageRE.MatchString(ref):
		return nil
	case imageRE.MatchString(strings.ToLower(ref)):
		return fmt.Errorf("image %q: the name of a repository is in small letters", ref)
	}
	return fmt.Errorf("image %q is no valid reference: want [HOST[:PORT]/]NAME[:TAG][@DIGEST]", ref)
}

// Validate reports the first thing wrong.
func (m Mount) Validate() error {
	if !path.IsAbs(m.Target) {
		return fmt.Errorf("mount target %q: want an absolute path in the container", m.Target)
	}
	if path.Clean(m.Target) == "/" {
		return fmt.Errorf("mount target / is the container itself: use a directory in it")
	}
	switch m.Type {
	case MountBind:
		if !path.IsAbs(m.Source) {
			return fmt.Errorf("bind mount %q at %s: want an absolute path on the node as its source", m.Source, m.Target)
		}
		switch m.Propagation {
		case "", "private", "rprivate", "slave", "rslave", "shared", "rshared":
		default:
			return fmt.Errorf("bind propagation %q: use private, rprivate, slave, rslave, shared or rshared", m.Propagation)
		}
	case MountVolume:
		if m.Source != "" {
			if err := ValidateVolumeName(m.Source); err != nil {
				return err
			}
		}
		if m.Driver != "" && m.Driver != "local" {
			return fmt.Errorf("volume driver %q is not here: use local", m.Driver)
		}
	case MountTmpfs:
		if m.Source != "" {
			return fmt.Errorf("a tmpfs at %s has no source: leave %q out", m.Target, m.Source)
		}
		if m.Size < 0 {
			return fmt.Errorf("size %d of the tmpfs at %s is negative", m.Size, m.Target)
		}
	default:
		return fmt.Errorf("mount type %q: use bind, volume or tmpfs", m.Type)
	}
	return nil
}

var volumeRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// ValidateVolumeName reports what is wrong with the name of a volume (Docker's
// rule).
func ValidateVolumeName(name string) error {
	if !volumeRE.MatchString(name) || len(name) > 255 {
		return fmt.Errorf("volume name %q: use two or more of letters, digits, '_', '.' and '-', the first a letter or digit; a directory of the node is given by its whole path", name)
	}
	return nil
}

// ParseMount reads the value of --mount: a line of comma-separated KEY=VALUE.
func ParseMount(s string) (Mount, error) {
	m := Mount{Type: MountVolume}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return m, fmt.Errorf("mount %q: %w", s, err)
	}
	for _, f := range fields {
		k, v, has := strings.Cut(f, "=")
		k = strings.ToLower(strings.TrimSpace(k))
		flag := func() (bool, error) {
			if !has {
				return true, nil
			}
			b, err := strconv.ParseBool(v)
			if err != nil {
				return false, fmt.Errorf("mount option %s=%q: use true or false", k, v)
			}
			return b, nil
		}
		switch k {
		case "type":
			m.Type = strings.ToLower(v)
		case "source", "src":
			m.Source = v
		case "target", "dst", "destination":
			m.Target = v
		case "readonly", "ro":
			if m.ReadOnly, err = flag(); err != nil {
				return m, err
			}
		case "volume-nocopy":
			if m.NoCopy, err = flag(); err != nil {
				return m, err
			}
		case "volume-driver":
			m.Driver = v
		case "volume-label":
			lk, lv, _ := strings.Cut(v, "=")
			if m.Labels == nil {
				m.Labels = map[string]string{}
			}
			m.Labels[lk] = lv
		case "bind-propagation":
			m.Propagation = v
		case "tmpfs-size":
			if m.Size, err = ParseBytes(v); err != nil {
				return m, fmt.Errorf("mount option tmpfs-size: %w", err)
			}
		case "tmpfs-mode":
			n, err := strconv.ParseUint(v, 8, 12)
			if err != nil {
				return m, fmt.Errorf("mount option tmpfs-mode=%q: want octal digits, like 1777", v)
			}
			m.Mode = uint32(n)
		case "consistency", "bind-nonrecursive", "bind-recursive", "volume-subpath", "volume-opt":
			if k == "volume-subpath" || k == "volume-opt" {
				return m, fmt.Errorf("mount option %s is not supported: bind the directory instead", k)
			}
		default:
			return m, fmt.Errorf("mount option %q is unknown: use type, source, target, readonly, bind-propagation, volume-nocopy, volume-driver, volume-label, tmpfs-size or tmpfs-mode", k)
		}
	}
	if m.Target == "" {
		return m, fmt.Errorf("mount %q has no target: add target=/PATH", s)
	}
	return m, m.Validate()
}

// ParseVolume reads the value of -v: [SOURCE:]TARGET[:OPTIONS].
func ParseVolume(s string) (Mount, error) {
	parts := strings.Split(s, ":")
	m := Mount{Type: MountVolume}
	switch len(parts) {
	case 1:
		m.Target = parts[0]
	case 2, 3:
		m.Source, m.Target = parts[0], parts[1]
		if m.Source == "" {
			return m, fmt.Errorf("volume %q names no source: leave the colon out, or name a volume or path", s)
		}
	default:
		return m, fmt.Errorf("volume %q: want [SOURCE:]TARGET[:OPTIONS]", s)
	}
	if path.IsAbs(m.Source) {
		m.Type, m.CreateSrc = MountBind, true
	}
	if len(parts) == 3 {
		for _, o := range strings.Split(parts[2], ",") {
			switch o {
			case "ro":
				m.ReadOnly = true
			case "rw", "z", "Z", "consistent", "cached", "delegated":
			case "nocopy":
				m.NoCopy = true
			case "private", "rprivate", "slave", "rslave", "shared", "rshared":
				m.Propagation = o
			default:
				return m, fmt.Errorf("volume %q: option %q is unknown: use ro, rw, nocopy or a propagation like rslave", s, o)
			}
		}
	}
	return m, m.Validate()
}

// ParseTmpfs reads the value of --tmpfs: TARGET[:OPTIONS].
func ParseTmpfs(s string) (Mount, error) {
	target, opts, _ := strings.Cut(s, ":")
	m := Mount{Type: MountTmpfs, Target: target}
	for _, o := range strings.Split(opts, ",") {
		k, v, _ := strings.Cut(o, "=")
		var err error
		switch k {
		case "", "rw":
		case "ro":
			m.ReadOnly = true
		case "size":
			if m.Size, err = ParseBytes(v); err != nil {
				return m, fmt.Errorf("tmpfs %q: %w", s, err)
			}
		case "mode":
			n, err := strconv.ParseUint(v, 8, 12)
			if err != nil {
				return m, fmt.Errorf("tmpfs %q: mode %q: want octal digits, like 1777", s, v)
			}
			m.Mode = uint32(n)
		case "exec", "noexec", "suid", "nosuid", "dev", "nodev", "uid", "gid", "nr_inodes", "noatime", "relatime":
			m.Options = append(m.Options, o)
		default:
			return m, fmt.Errorf("tmpfs %q: option %q is unknown", s, k)
		}
	}
	return m, m.Validate()
}

// ParseBytes reads a size: a number with b, k, m, g or t (of 1024), as Docker
// takes it.
func ParseBytes(s string) (int64, error) {
	num := strings.ToLower(strings.TrimSpace(s))
	num = strings.TrimSuffix(strings.TrimSuffix(num, "b"), "i")
	shift := 0
	if n := len(num); n > 0 {
		if i := strings.IndexByte("kmgtp", num[n-1]); i >= 0 {
			shift, num = 10*(i+1), num[:n-1]
		}
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || f < 0 || f*float64(int64(1)<<shift) >= 1<<62 {
		return 0, fmt.Errorf("size %q: want a number with k, m or g, like 64m", s)
	}
	return int64(f * float64(int64(1)<<shift)), nil
}

// ulimits are the resources of getrlimit(2), by Docker's names.
var ulimits = []string{"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"}

// ParseUlimit reads NAME=SOFT[:HARD]; -1 is no limit.
func ParseUlimit(s string) (name string, soft, hard uint64, err error) {
	name, v, ok := strings.Cut(s, "=")
	if !ok || !slices.Contains(ulimits, name) {
		return "", 0, 0, fmt.Errorf("ulimit %q: want NAME=SOFT[:HARD], NAME one of %s", s, strings.Join(ulimits, ", "))
	}
	a, b, two := strings.Cut(v, ":")
	if !two {
		b = a
	}
	parse := func(s string) (uint64, error) {
		if s == "-1" || s == "unlimited" {
			return ^uint64(0), nil
		}
		return strconv.ParseUint(s, 10, 63)
	}
	soft, err1 := parse(a)
	hard, err2 := parse(b)
	if err1 != nil || err2 != nil {
		return "", 0, 0, fmt.Errorf("ulimit %q: want numbers, or -1 for no limit", s)
	}
	if soft > hard {
		return "", 0, 0, fmt.Errorf("ulimit %q: the soft limit is above the hard one", s)
	}
	return name, soft, hard, nil
}

// ParseDevice reads HOST[:CONTAINER[:PERMISSIONS]].
func ParseDevice(s string) (host, container, perm string, err error) {
	parts := strings.Split(s, ":")
	host, container, perm = parts[0], parts[0], "rwm"
	isPerm := func(s string) bool { return s != "" && strings.Trim(s, "rwm") == "" }
	switch {
	case len(parts) == 2 && isPerm(parts[1]):
		perm = parts[1]
	case len(parts) == 2:
		container = parts[1]
	case len(parts) == 3:
		container, perm = parts[1], parts[2]
	case len(parts) > 3:
		err = fmt.Errorf("device %q: want HOST[:CONTAINER[:PERMISSIONS]]", s)
	}
	if err == nil && (!path.IsAbs(host) || !path.IsAbs(container) || !isPerm(perm)) {
		err = fmt.Errorf("device %q: want absolute paths, and of permissions r, w and m", s)
	}
	return host, container, perm, err
}
