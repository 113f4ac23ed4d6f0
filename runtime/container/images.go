package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// Platform is what this node runs, as images name it: linux/amd64.
func Platform() string { return platforms.Format(platforms.Normalize(platforms.DefaultSpec())) }

// find returns an image of this node by reference or, of a reference with a
// digest, any that has this digest: one that was loaded has no such name.
func (e *Executor) find(ctx context.Context, c *client.Client, image string) (client.Image, error) {
	name, err := Normalize(image)
	if err != nil {
		return nil, err
	}
	img, err := c.GetImage(ctx, name)
	if err == nil || !errdefs.IsNotFound(err) {
		return img, e.unavailable(err)
	}
	if d, ok := digestOf(name); ok {
		all, err := c.ImageService().List(ctx, fmt.Sprintf("target.digest==%s", d))
		if err != nil {
			return nil, e.unavailable(err)
		}
		if len(all) > 0 {
			return client.NewImage(c, all[0]), nil
		}
	}
	return nil, fmt.Errorf("%w: image %s", errdefs.ErrNotFound, Familiar(name))
}

func digestOf(ref string) (digest.Digest, bool) {
	_, d, ok := strings.Cut(ref, "@")
	return digest.Digest(d), ok
}

// flights lets one pull of an image serve all who want it.
type flights struct {
	mu sync.Mutex
	m  map[string]*flight
}

type flight struct {
	done chan struct{}
	err  error

	mu   sync.Mutex
	said string
}

func (f *flight) say(s string) {
	f.mu.Lock()
	f.said = s
	f.mu.Unlock()
}

func (f *flight) saying() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.said
}

// progressTime is how often who waits for a pull is told.
const progressTime = 500 * time.Millisecond

// join waits for the flight of key, which fn makes if there is none. The flight
// ends with ctx of the one that made it; who else waits then makes another.
func (fs *flights) join(ctx context.Context, key string, progress func(string), fn func(say func(string)) error) error {
	for {
		fs.mu.Lock()
		if fs.m == nil {
			fs.m = map[string]*flight{}
		}
		f := fs.m[key]
		mine := f == nil
		if mine {
			f = &flight{done: make(chan struct{})}
			fs.m[key] = f
		}
		fs.mu.Unlock()
		if mine {
			f.err = fn(func(s string) {
				f.say(s)
				progress(s)
			})
			fs.mu.Lock()
			delete(fs.m, key)
			fs.mu.Unlock()
			close(f.done)
			return f.err
		}
		t := time.NewTicker(progressTime)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				t.Stop()
				return ctx.Err()
			case <-f.done:
				waiting = false
			case <-t.C:
				if s := f.saying(); s != "" {
					progress(s)
				}
			}
		}
		t.Stop()
		if f.err == nil || !errors.Is(f.err, context.Canceled) {
			return f.err
		}
	}
}

// pullOf is what pulls have in common that one can stand for: the image, and the login,
// without which, or with another, a registry may answer otherwise.
func pullOf(name, auth string) string { return name + "\x00" + auth }

// Pull fetches an image for this node's platform.
func (e *Executor) Pull(ctx context.Context, image, auth, by string, progress func(string)) error {
	name, err := Normalize(image)
	if err != nil {
		return err
	}
	return e.pulls.join(ctx, pullOf(name, auth), progress, func(say func(string)) (err error) {
		ctx, done, err := e.lease(ctx)
		if err != nil {
			return err
		}
		defer func() { done(err != nil) }()
		tell := func(s string) { say("pulling " + shown(image) + s) }
		for try := 1; ; try++ {
			err := e.pullOnce(ctx, name, auth, by, tell)
			if err == nil || ctx.Err() != nil || try >= e.cfg.Pull.Tries || !passing(err) {
				return explainPull(image, err)
			}
			wait := time.Duration(1<<(try-1)) * time.Second
			wait += rand.N(wait / 4)
			tell(fmt.Sprintf(": %s: trying again in %s", explainPull(image, err), wait.Round(time.Second)))
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
		}
	})
}

func (e *Executor) pullOnce(ctx context.Context, name, auth, by string, tell func(string)) error {
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return err
	}
	got := &transfer{}
	res, err := e.resolver(ctx, auth, got)
	if err != nil {
		return err
	}
	tctx, cancel := context.WithCancel(ctx)
	told := make(chan struct{})
	go func() {
		defer close(told)
		tellPull(tctx, got, tell)
	}()
	labels := map[string]string{labelInstance: e.cfg.Instance, labelBy: by, labelUsed: strconv.FormatInt(time.Now().Unix(), 10)}
	_, err = c.Pull(ctx, name, client.WithPullUnpack, client.WithResolver(res), client.WithPullSnapshotter(e.cfg.Snapshotter), client.WithPullLabels(labels))
	cancel()
	<-told
	return e.unavailable(err)
}

// tellPull tells of a pull's progress until ctx ends.
func tellPull(ctx context.Context, got *transfer, tell func(string)) {
	t := time.NewTicker(progressTime)
	defer t.Stop()
	tell("")
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		switch have, total := got.have.Load(), got.total.Load(); {
		case total > 0 && got.open.Load() > 0:
			tell(fmt.Sprintf(": %s of %s", size(have), size(total)))
		case have > 0:
			tell(": unpacking")
		}
	}
}

func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%d kB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}

// passing tells of errors that another try may not meet.
func passing(err error) bool {
	switch code := status(err); {
	case code != 0:
		return code >= 500 || code == http.StatusTooManyRequests
	case notThere(err), refused(err), errdefs.IsInvalidArgument(err), errdefs.IsFailedPrecondition(err), noSpace(err), says(err, noPlatform...), says(err, wrongContent...),
		says(err, damaged...), says(err, untrusted...):
		return false
	}
	return true
}

// Words of errors that have no type of their own.
var (
	noPlatform   = []string{"no match for platform"}
	wrongContent = []string{"unexpected digest", "unexpected commit digest", "unexpected commit size", "failed size validation"}
	damaged      = []string{"failed to extract layer", "archive/tar", "gzip: invalid", "wrong diff id"}
	untrusted    = []string{"x509: ", "server gave HTTP response to HTTPS client"}
)

func says(err error, words ...string) bool {
	return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(err.Error(), w) })
}

// status is the HTTP status that a registry answered with; 0: that is not what is wrong.
func status(err error) int {
	var s remoteserrors.ErrUnexpectedStatus
	if errors.As(err, &s) {
		return s.StatusCode
	}
	return 0
}

// unresolved begins the errors of containerd's client when a registry is asked for what a
// name stands for.
const unresolved = "failed to resolve reference"

// notThere tells of a registry that does not have an image. That containerd misses
// something of its own, which it lost when it was killed, is another thing.
func notThere(err error) bool {
	return errdefs.IsNotFound(err) && says(err, unresolved, "content at ") || status(err) == http.StatusNotFound
}

// refused tells of a registry that wants another login, or any.
func refused(err error) bool {
	code := status(err)
	return code == http.StatusUnauthorized || code == http.StatusForbidden || errors.Is(err, docker.ErrInvalidAuthorization) || errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) ||
		says(err, "insufficient_scope")
}

func noSpace(err error) bool {
	return says(err, "no space left on device", "disk quota exceeded")
}

// explainPull says what to do about an error.
func explainPull(image string, err error) error {
	if err == nil {
		return nil
	}
	host := image
	if r, perr := reference.ParseNormalizedNamed(image); perr == nil {
		host = reference.Domain(r)
	}
	image = shown(image)
	var op *net.OpError
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, runtime.ErrUnavailable):
		return err
	case noSpace(err):
		return fmt.Errorf("image %s: the disk of containerd is full: make room there, for instance with 'shoal image prune'", image)
	case says(err, noPlatform...):
		return fmt.Errorf("image %s has no variant for this node's platform %s", image, Platform())
	case refused(err):
		return fmt.Errorf("image %s: registry %s refused it without a valid login: run 'shoal login %s' and give --with-registry-auth", image, host, host)
	case notThere(err):
		return fmt.Errorf("image %s is not in registry %s: check its name and tag, or load it with 'shoal image load'", image, host)
	case errors.Is(err, errStalled), errors.Is(err, context.DeadlineExceeded), says(err, "timeout awaiting response headers", "TLS handshake timeout", "i/o timeout"):
		return fmt.Errorf("image %s: registry %s does not answer in time: check it, and the way to it from this node: %w", image, host, err)
	case says(err, untrusted...):
		return fmt.Errorf("image %s: registry %s has no certificate that this node trusts: put its CA below the agent's --registry-config, as %s/ca.crt, or give the agent --insecure-registry %s: %w", image, host, host, host, err)
	case says(err, wrongContent...):
		return fmt.Errorf("image %s: registry %s sent something else than the image's digest says (damaged, or tampered with): push it anew: %w", image, host, err)
	case says(err, damaged...):
		return fmt.Errorf("image %s has a damaged layer: build and push it anew: %w", image, err)
	case status(err) >= 500:
		return fmt.Errorf("image %s: registry %s fails: see its own log: %w", image, host, err)
	case errors.As(err, &op):
		return fmt.Errorf("image %s: registry %s can't be reached: check it, and the way to it from this node: %w", image, host, err)
	}
	return fmt.Errorf("image %s: %w", image, err)
}

// Bounds on asking a registry for a digest.
const (
	resolveTime  = 10 * time.Second
	resolveLocal = 2 * time.Second // when the node has an image of that name
)

// Resolve returns the image with the digest that its registry, or this node if the
// registry does not know it, now has for it.
func (e *Executor) Resolve(ctx context.Context, image, auth string) (string, error) {
	name, err := Normalize(image)
	if err != nil {
		return "", err
	}
	if _, ok := digestOf(name); ok {
		return image, nil
	}
	c, cctx, err := e.conn(ctx)
	if err != nil {
		return "", err
	}
	here, err := c.GetImage(cctx, name)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", e.unavailable(err)
	}
	// A registry that can't be reached is no reason to wait for long for the digest
	// of an image that is here.
	limit := resolveTime
	if err == nil {
		limit = resolveLocal
	}
	rctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	res, rerr := e.resolver(rctx, auth, &transfer{})
	if rerr != nil {
		return "", rerr
	}
	_, desc, rerr := res.Resolve(rctx, name)
	if rerr == nil {
		return name + "@" + desc.Digest.String(), nil
	}
	if err == nil {
		return name + "@" + here.Target().Digest.String(), nil
	}
	return "", explainPull(image, fmt.Errorf("%s: %w", unresolved, rerr))
}

// Prepare implements runtime.Executor.
func (e *Executor) Prepare(ctx context.Context, t runtime.Task, progress func(string)) (s spec.TaskSpec, err error) {
	err = e.persist(ctx, func(err error) { progress(err.Error() + ": waiting for it") }, func() error {
		s, err = e.prepare(ctx, t, progress)
		return err
	})
	return s, err
}

func (e *Executor) prepare(ctx context.Context, t runtime.Task, progress func(string)) (spec.TaskSpec, error) {
	s := t.Spec.Clone()
	c, cctx, err := e.conn(ctx)
	if err != nil {
		return s, err
	}
	img, err := e.find(cctx, c, s.Image)
	switch {
	case err != nil && !errdefs.IsNotFound(err):
		return s, err
	case err != nil && s.Pull == spec.PullNever:
		return s, fmt.Errorf("image %s is not on node %s, and is not to be pulled (--pull never): load it there with 'shoal image load'", shown(s.Image), e.cfg.Node)
	case err != nil, s.Pull == spec.PullAlways:
		if err := e.Pull(ctx, s.Image, s.RegistryAuth, "task", progress); err != nil {
			return s, fmt.Errorf("node %s: %w", e.cfg.Node, err)
		}
		if img, err = e.find(cctx, c, s.Image); err != nil {
			return s, fmt.Errorf("node %s: %w", e.cfg.Node, err)
		}
	}
	e.used(cctx, c, img) // before it is taken for one that nobody uses
	cfg, err := imageConfig(cctx, img)
	if err != nil {
		return s, fmt.Errorf("node %s: image %s: %w", e.cfg.Node, shown(s.Image), platformError(err))
	}
	if err := cfg.apply(&s); err != nil {
		return s, fmt.Errorf("image %s: %w", shown(s.Image), err)
	}
	if s.Init {
		s.Command = append(append([]string{initPath, initWord, "--"}, s.Entrypoint...), s.Command...)
		s.Entrypoint = nil
	}
	return s, nil
}

// initWord tells this program to be an init (see Dispatch).
const initWord = "container-init"

func platformError(err error) error {
	if strings.Contains(err.Error(), "no match for platform") || errdefs.IsNotFound(err) {
		return fmt.Errorf("it has no variant for this node's platform %s", Platform())
	}
	return err
}

// imageConf is an image's configuration: OCI's, and Docker's health check.
type imageConf struct {
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
	OS           string `json:"os"`
	Config       struct {
		ocispec.ImageConfig
		Healthcheck *struct {
			Test          []string
			Interval      time.Duration
			Timeout       time.Duration
			StartPeriod   time.Duration
			StartInterval time.Duration
			Retries       int
		}
	} `json:"config"`
}

func imageConfig(ctx context.Context, img client.Image) (*imageConf, error) {
	desc, err := img.Config(ctx)
	if err != nil {
		return nil, err
	}
	if desc.Size > 8<<20 {
		return nil, fmt.Errorf("its configuration has %d bytes: more than any should have", desc.Size)
	}
	b, err := content.ReadBlob(ctx, img.ContentStore(), desc)
	if err != nil {
		return nil, err
	}
	cfg := &imageConf{}
	if err := json.Unmarshal(b, cfg); err != nil {
		return nil, fmt.Errorf("its configuration is damaged: %w", err)
	}
	// That of an image without an index is found nowhere else.
	p := platforms.Normalize(ocispec.Platform{OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant})
	if cfg.OS != "" && cfg.Architecture != "" && !platforms.Default().Match(p) {
		return nil, fmt.Errorf("it is for %s, and this node's platform is %s", platforms.Format(p), Platform())
	}
	return cfg, nil
}

// mergeEnv is an environment in which the later value of a variable is in the earlier
// one's place.
func mergeEnv(base, more []string) []string {
	out := append([]string{}, base...)
	for _, kv := range more {
		k, _, _ := strings.Cut(kv, "=")
		replaced := false
		for i := range out {
			if strings.HasPrefix(out[i], k+"=") {
				out[i], replaced = kv, true
			}
		}
		if !replaced {
			out = append(out, kv)
		}
	}
	return out
}

// apply puts the image's defaults where the user said nothing.
func (c *imageConf) apply(s *spec.TaskSpec) error {
	ic := c.Config
	own := len(s.Entrypoint) > 0 // then the image's command goes, too, as in Docker
	if own && len(s.Entrypoint) == 1 && s.Entrypoint[0] == "" {
		s.Entrypoint = nil
	} else if !own {
		s.Entrypoint = ic.Entrypoint
	}
	if len(s.Command) == 0 && !own {
		s.Command = ic.Cmd
	}
	if len(s.Entrypoint)+len(s.Command) == 0 {
		return errors.New("it says no command, and none is given: add one after the image")
	}
	s.Env = mergeEnv(ic.Env, s.Env)
	if s.User == "" {
		s.User = ic.User
	}
	if s.Dir == "" {
		s.Dir = ic.WorkingDir
	}
	if s.StopSignal == "" {
		s.StopSignal = ic.StopSignal
	}
	for p := range ic.ExposedPorts {
		if !strings.Contains(p, "/") {
			p += "/tcp"
		}
		if !slices.Contains(s.Expose, p) {
			s.Expose = append(s.Expose, p)
		}
	}
	slices.Sort(s.Expose)
	var vols []string
	for v := range ic.Volumes {
		vols = append(vols, v)
	}
	slices.Sort(vols)
	for _, v := range vols {
		if !slices.ContainsFunc(s.Mounts, func(m spec.Mount) bool { return m.Target == v || m.Target == strings.TrimSuffix(v, "/") }) {
			s.Mounts = append(s.Mounts, spec.Mount{Type: spec.MountVolume, Target: v})
		}
	}
	if h := ic.Healthcheck; h != nil && len(h.Test) > 0 {
		s.Health = health(s.Health, h.Test, h.Interval, h.Timeout, h.StartPeriod, h.StartInterval, h.Retries)
	}
	if s.Health != nil && (s.Health.Disabled || s.Health.Command == "" && len(s.Health.Exec) == 0) {
		s.Health = nil
	}
	return nil
}

// health is the image's check, but for what the user said.
func health(user *spec.HealthCheck, test []string, interval, timeout, start, startInterval time.Duration, retries int) *spec.HealthCheck {
	h := spec.HealthCheck{}
	if user != nil {
		h = *user
	}
	if h.Disabled {
		return &h
	}
	if h.Command == "" && len(h.Exec) == 0 {
		switch test[0] {
		case "NONE":
			return nil
		case "CMD":
			h.Exec = test[1:]
		case "CMD-SHELL":
			h.Command = strings.Join(test[1:], " ")
		default:
			h.Exec = test
		}
	}
	def := func(to *time.Duration, v time.Duration) {
		if *to == 0 && v > 0 {
			*to = v
		}
	}
	def(&h.Interval, interval)
	def(&h.Timeout, timeout)
	def(&h.StartPeriod, start)
	def(&h.StartInterval, startInterval)
	if h.Retries == 0 && retries > 0 {
		h.Retries = retries
	}
	return &h
}

// used notes that a task begins, or has ended, that is of an image.
func (e *Executor) used(ctx context.Context, c *client.Client, img client.Image) {
	i := img.Metadata()
	if i.Labels == nil {
		i.Labels = map[string]string{}
	}
	i.Labels[labelUsed] = strconv.FormatInt(time.Now().Unix(), 10)
	if _, err := c.ImageService().Update(ctx, i, "labels."+labelUsed); err != nil {
		e.log.Debug("the use of an image can't be noted", "image", i.Name, "error", err)
	}
}

// Images lists them, by name.
func (e *Executor) Images(ctx context.Context) ([]runtime.Image, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, err
	}
	all, err := c.ListImages(ctx)
	if err != nil {
		return nil, e.unavailable(err)
	}
	using, err := e.imagesInUse(ctx, c)
	if err != nil {
		return nil, err
	}
	var out []runtime.Image
	for _, i := range all {
		img := runtime.Image{Name: Familiar(i.Name()), Ref: i.Name(), Digest: i.Target().Digest.String(), Created: i.Metadata().CreatedAt, InUse: using[i.Target().Digest.String()]}
		if n, err := i.Usage(ctx, client.WithSnapshotUsage()); err == nil {
			img.Size = n
		} else if n, err := i.Size(ctx); err == nil {
			img.Size = n
		} else {
			img.Damaged = true
		}
		if s, err := i.Spec(ctx); err == nil && s.Created != nil {
			img.Created = *s.Created
		}
		out = append(out, img)
	}
	slices.SortFunc(out, func(a, b runtime.Image) int { return strings.Compare(a.Ref, b.Ref) })
	return out, nil
}

// imagesInUse are the digests of images of containers, with the tasks' names.
func (e *Executor) imagesInUse(ctx context.Context, c *client.Client) (map[string][]string, error) {
	cs, err := c.ContainerService().List(ctx)
	if err != nil {
		return nil, e.unavailable(err)
	}
	out := map[string][]string{}
	for _, x := range cs {
		if img, err := c.ImageService().Get(ctx, x.Image); err == nil {
			d := img.Target.Digest.String()
			out[d] = append(out[d], x.Labels[labelTask])
		}
	}
	return out, nil
}

// RemoveImage takes an image, by name, reference or beginning of its digest, from
// this node, and returns the references that went. One in use stays unless force.
func (e *Executor) RemoveImage(ctx context.Context, ref string, force bool) ([]string, error) {
	all, err := e.Images(ctx)
	if err != nil {
		return nil, err
	}
	name, _ := Normalize(ref)
	hit := slices.DeleteFunc(slices.Clone(all), func(i runtime.Image) bool { return i.Ref != name && i.Name != ref })
	if len(hit) == 0 {
		short := strings.TrimPrefix(ref, "sha256:")
		hit = slices.DeleteFunc(all, func(i runtime.Image) bool {
			return len(short) < 4 || !strings.HasPrefix(strings.TrimPrefix(i.Digest, "sha256:"), short)
		})
		for _, i := range hit {
			if i.Digest != hit[0].Digest {
				return nil, fmt.Errorf("image %q is ambiguous: more than one digest begins with it", ref)
			}
		}
	}
	if len(hit) == 0 {
		return nil, fmt.Errorf("%w: %s", runtime.ErrNoImage, ref)
	}
	// Another name keeps the content of one that is used.
	last := !slices.ContainsFunc(all, func(i runtime.Image) bool {
		return i.Digest == hit[0].Digest && !slices.ContainsFunc(hit, func(h runtime.Image) bool { return h.Ref == i.Ref })
	})
	if last && len(hit[0].InUse) > 0 && !force {
		return nil, fmt.Errorf("image %s is used by task %s: remove that first, or use --force", ref, strings.Join(hit[0].InUse, ", "))
	}
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, err
	}
	var out []string
	for n, i := range hit {
		var opts []images.DeleteOpt
		if n == len(hit)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := c.ImageService().Delete(ctx, i.Ref, opts...); err != nil && !errdefs.IsNotFound(err) {
			return out, e.unavailable(err)
		}
		out = append(out, i.Ref)
	}
	return out, nil
}

// PruneImages removes images that no task uses: with all, every one of them, else
// those without a tag; unused, those not used for so long. It returns what went
// and how many bytes they had.
func (e *Executor) PruneImages(ctx context.Context, all bool, unused time.Duration, onlyTasks bool) (gone []string, bytes int64, err error) {
	list, err := e.Images(ctx)
	if err != nil {
		return nil, 0, err
	}
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, 0, err
	}
	for _, i := range list {
		if len(i.InUse) > 0 || !all && strings.Contains(i.Ref, ":") && !strings.Contains(i.Ref, "@") {
			continue
		}
		m, err := c.ImageService().Get(ctx, i.Ref)
		if err != nil {
			continue
		}
		if onlyTasks && m.Labels[labelBy] != "task" {
			continue
		}
		at := m.UpdatedAt
		if n, err := strconv.ParseInt(m.Labels[labelUsed], 10, 64); err == nil && time.Unix(n, 0).Before(at) {
			at = time.Unix(n, 0)
		}
		if unused > 0 && time.Since(at) < unused {
			continue
		}
		if err := c.ImageService().Delete(ctx, i.Ref, images.SynchronousDelete()); err != nil && !errdefs.IsNotFound(err) {
			return gone, bytes, e.unavailable(err)
		}
		gone, bytes = append(gone, i.Ref), bytes+i.Size
	}
	return gone, bytes, nil
}

// Load reads an archive of docker save, or an OCI layout in a tar, and returns the
// names of the images in it.
func (e *Executor) Load(ctx context.Context, r io.Reader, name string) (_ []string, err error) {
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, err
	}
	prefix := "docker.io/library/import"
	if name != "" {
		if prefix, err = Normalize(name); err != nil {
			return nil, err
		}
	}
	translate := func(ref string) string {
		if name != "" {
			return prefix
		}
		if n, err := Normalize(ref); err == nil {
			return n
		}
		return archive.AddRefPrefix(prefix)(ref)
	}
	labels := map[string]string{labelInstance: e.cfg.Instance, labelBy: "load", labelUsed: strconv.FormatInt(time.Now().Unix(), 10)}
	ctx, done, err := e.lease(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { done(err != nil) }()
	imgs, err := c.Import(ctx, r, client.WithImageRefTranslator(translate), client.WithImageLabels(labels), client.WithImportPlatform(platforms.DefaultStrict()), client.WithSkipMissing(),
		client.WithDigestRef(func(d digest.Digest) string {
			if name != "" {
				return prefix
			}
			return prefix + "@" + d.String()
		}), client.WithSkipDigestRef(func(n string) bool { return n != "" }))
	if err != nil {
		if noSpace(err) {
			return nil, errors.New("the disk of containerd is full: make room there, for instance with 'shoal image prune'")
		}
		if strings.Contains(err.Error(), "might be filtered out") {
			return nil, fmt.Errorf("the archive holds no image for this node's platform %s", Platform())
		}
		return nil, fmt.Errorf("this is no archive of 'docker save' and no OCI layout in a tar, or it is damaged: %w", e.unavailable(err))
	}
	if len(imgs) == 0 {
		return nil, fmt.Errorf("the archive holds no image for this node's platform %s", Platform())
	}
	var out []string
	for _, m := range imgs {
		img := client.NewImage(c, m)
		if err := img.Unpack(ctx, e.cfg.Snapshotter); err != nil {
			err = platformError(err)
			for _, m := range imgs {
				_ = c.ImageService().Delete(ctx, m.Name, images.SynchronousDelete())
			}
			return nil, fmt.Errorf("image %s: %w", Familiar(m.Name), err)
		}
		out = append(out, Familiar(m.Name))
	}
	return out, nil
}

// Save writes images as an archive that docker load and Load take.
func (e *Executor) Save(ctx context.Context, refs []string, w io.Writer) error {
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return err
	}
	opts := []archive.ExportOpt{archive.WithPlatform(platforms.DefaultStrict()), archive.WithSkipMissing(c.ContentStore())}
	for _, r := range refs {
		img, err := e.find(ctx, c, r)
		if err != nil {
			if errdefs.IsNotFound(err) {
				return fmt.Errorf("%w: %s", runtime.ErrNoImage, r)
			}
			return err
		}
		opts = append(opts, archive.WithImage(c.ImageService(), img.Name()))
	}
	return e.unavailable(c.Export(ctx, w, opts...))
}

// InspectImage returns an image's own configuration, as it is.
func (e *Executor) InspectImage(ctx context.Context, ref string) (runtime.Image, json.RawMessage, error) {
	all, err := e.Images(ctx)
	if err != nil {
		return runtime.Image{}, nil, err
	}
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return runtime.Image{}, nil, err
	}
	img, err := e.find(ctx, c, ref)
	if errdefs.IsNotFound(err) {
		return runtime.Image{}, nil, fmt.Errorf("%w: %s", runtime.ErrNoImage, ref)
	}
	if err != nil {
		return runtime.Image{}, nil, err
	}
	desc, err := img.Config(ctx)
	if err != nil {
		return runtime.Image{}, nil, platformError(err)
	}
	b, err := content.ReadBlob(ctx, img.ContentStore(), desc)
	if err != nil {
		return runtime.Image{}, nil, err
	}
	for _, i := range all {
		if i.Ref == img.Name() {
			return i, b, nil
		}
	}
	return runtime.Image{Name: Familiar(img.Name()), Ref: img.Name(), Digest: img.Target().Digest.String()}, b, nil
}

var _ runtime.Images = (*Executor)(nil)
