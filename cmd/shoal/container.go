package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/agent"
	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/spec"
)

// containerFlags are those of run and svc create for tasks from images.
type containerFlags struct {
	entrypoint, pull, shmSize                           string
	mounts, volumes, tmpfs, caps, dropCaps, security    []string
	devices, ulimits, sysctls, groups                   []string
	readOnly, privileged, init, registryAuth, noResolve bool
	entrypointGiven                                     bool
}

func (t *containerFlags) add(f *pflag.FlagSet, service bool) {
	f.StringArrayVar(&t.mounts, "mount", nil, "mount, type=…,source=…,target=… (repeatable)")
	f.BoolVar(&t.readOnly, "read-only", false, "the root file system can't be written to")
	f.StringSliceVar(&t.caps, "cap-add", nil, "further capability, like NET_ADMIN, or ALL (repeatable)")
	f.StringSliceVar(&t.dropCaps, "cap-drop", nil, "capability to take away, or ALL (repeatable)")
	f.StringArrayVar(&t.sysctls, "sysctl", nil, "kernel parameter of the container, NAME=VALUE (repeatable)")
	f.StringArrayVar(&t.ulimits, "ulimit", nil, "limit, NAME=SOFT[:HARD] (repeatable)")
	f.BoolVar(&t.init, "init", false, "an init passes signals on and reaps what the program leaves behind")
	if service {
		f.StringVar(&t.entrypoint, "entrypoint", "", "command line instead of the image's entrypoint")
		f.StringSliceVar(&t.groups, "group", nil, "further group of the user (repeatable)")
		f.BoolVar(&t.registryAuth, "with-registry-auth", false, "send this user's login of the registry to the nodes")
		f.BoolVar(&t.noResolve, "no-resolve-image", false, "don't pin the image to the digest that it has now")
	} else {
		f.StringVar(&t.entrypoint, "entrypoint", "", "program instead of the image's entrypoint")
		f.StringSliceVar(&t.groups, "group-add", nil, "further group of the user (repeatable)")
		f.StringArrayVarP(&t.volumes, "volume", "v", nil, "[SOURCE:]TARGET[:OPTIONS]; a source with a / is a path of the node (repeatable)")
	}
	f.StringArrayVar(&t.tmpfs, "tmpfs", nil, "TARGET[:OPTIONS] of a tmpfs, like /run:size=64m (repeatable)")
	f.StringVar(&t.pull, "pull", "", "when the image is fetched: always, missing or never (default missing)")
	f.BoolVar(&t.privileged, "privileged", false, "all capabilities and devices of the node")
	f.StringArrayVar(&t.security, "security-opt", nil, "no-new-privileges, seccomp=unconfined, seccomp=FILE, apparmor=PROFILE (repeatable)")
	f.StringArrayVar(&t.devices, "device", nil, "device of the node, HOST[:CONTAINER[:rwm]] (repeatable)")
	f.StringVar(&t.shmSize, "shm-size", "", "size of /dev/shm, like 128m (default 64m)")
}

// addUpdate adds what svc update has of them: lists with -add, as Docker has them.
func (t *containerFlags) addUpdate(f *pflag.FlagSet) {
	f.StringArrayVar(&t.mounts, "mount-add", nil, "further mount, as in svc create (repeatable)")
	f.StringArrayVar(&t.tmpfs, "tmpfs-add", nil, "further tmpfs, TARGET[:OPTIONS] (repeatable)")
	f.BoolVar(&t.readOnly, "read-only", false, "the root file system can't be written to")
	f.StringSliceVar(&t.caps, "cap-add", nil, "further capability (repeatable)")
	f.StringSliceVar(&t.dropCaps, "cap-drop", nil, "capability to take away (repeatable)")
	f.StringArrayVar(&t.sysctls, "sysctl-add", nil, "kernel parameter, NAME=VALUE (repeatable)")
	f.StringArrayVar(&t.ulimits, "ulimit-add", nil, "limit, NAME=SOFT[:HARD] (repeatable)")
	f.StringSliceVar(&t.groups, "group-add", nil, "further group of the user (repeatable)")
	f.StringArrayVar(&t.devices, "device-add", nil, "device of the node, HOST[:CONTAINER[:rwm]] (repeatable)")
	f.BoolVar(&t.init, "init", false, "an init reaps what the program leaves behind")
	f.BoolVar(&t.privileged, "privileged", false, "all capabilities and devices of the node")
	f.StringVar(&t.pull, "pull", "", "when the image is fetched: always, missing or never")
	f.StringVar(&t.shmSize, "shm-size", "", "size of /dev/shm, like 128m")
	f.StringArrayVar(&t.security, "security-opt", nil, "instead of those that are there (repeatable)")
}

// container is what the flags say of an image; with none, that they say nothing.
func (t *containerFlags) container(image string) (spec.Container, error) {
	c := spec.Container{Image: image, Pull: t.pull, ReadOnly: t.readOnly, Privileged: t.privileged, CapAdd: t.caps, CapDrop: t.dropCaps, SecurityOpt: slices.Clone(t.security),
		Devices: t.devices, Ulimits: t.ulimits, Groups: t.groups, Init: t.init}
	if t.entrypointGiven {
		c.Entrypoint = []string{t.entrypoint}
	}
	for i, o := range c.SecurityOpt {
		// Docker's client reads the profile, too.
		if file, ok := strings.CutPrefix(o, "seccomp="); ok && file != "unconfined" && file != "builtin" && !strings.HasPrefix(file, "{") {
			b, err := os.ReadFile(file)
			if err != nil {
				return c, fmt.Errorf("--security-opt %s: %w", o, err)
			}
			c.SecurityOpt[i] = "seccomp=" + strings.TrimSpace(string(b))
		}
	}
	for _, parse := range []struct {
		values []string
		fn     func(string) (spec.Mount, error)
	}{{t.mounts, spec.ParseMount}, {t.volumes, spec.ParseVolume}, {t.tmpfs, spec.ParseTmpfs}} {
		for _, v := range parse.values {
			m, err := parse.fn(v)
			if err != nil {
				return c, err
			}
			c.Mounts = append(c.Mounts, m)
		}
	}
	for _, kv := range t.sysctls {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return c, fmt.Errorf("--sysctl %q: want NAME=VALUE", kv)
		}
		if c.Sysctls == nil {
			c.Sysctls = map[string]string{}
		}
		c.Sysctls[k] = v
	}
	if t.shmSize != "" {
		n, err := spec.ParseBytes(t.shmSize)
		if err != nil {
			return c, fmt.Errorf("--shm-size: %w", err)
		}
		c.ShmSize = n
	}
	return c, nil
}

// imageArgs tells an image and its arguments from a program of the node, which
// goes after --.
func imageArgs(cmd *cobra.Command, args []string) (image string, command []string) {
	if len(args) == 0 || cmd.ArgsLenAtDash() == 0 {
		return "", args
	}
	return args[0], args[1:]
}

// checkImage says what the first word is, if it is no image.
func checkImage(noun, image string, command []string) error {
	if err := spec.ValidateImage(image); err != nil {
		if strings.HasPrefix(image, "/") || strings.HasPrefix(image, "./") || strings.HasPrefix(image, "../") {
			return fmt.Errorf("%q is a program of the node, not an image: write: shoal %s [flags] -- %s", image, noun, strings.Join(append([]string{image}, command...), " "))
		}
		return err
	}
	return nil
}

// looksLikeProgram adds to the failure of an image's pull that its name is a
// program of this node.
func looksLikeProgram(noun, image string, command []string) string {
	if strings.ContainsAny(image, "/:@.") {
		return ""
	}
	for _, d := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if fi, err := os.Stat(d + "/" + image); err == nil && fi.Mode()&0o111 != 0 {
			return fmt.Sprintf("; to run the program %s/%s of the node, write: shoal %s [flags] -- %s", d, image, noun, strings.Join(append([]string{image}, command...), " "))
		}
	}
	return ""
}

// pin gives an image the digest that it has now, so that all replicas are one
// image. What can't be resolved stays as it is, said as Docker says it.
func (c *cli) pin(ctx context.Context, node string, ct *spec.Container) (warning string, err error) {
	req := connect.NewRequest(&shoalv1.ImageResolveRequest{Image: ct.Image, Auth: ct.RegistryAuth})
	req.Header().Set(agent.NodeHeader, node)
	resp, err := c.node().ImageResolve(ctx, req)
	var answered *connect.Error
	if err != nil && !errors.As(err, &answered) {
		return "", err // no agent answers
	}
	if err != nil {
		return client.Message(err), nil
	}
	ct.Image = resp.Msg.Ref
	return "", nil
}

// setContainer fills in what a task from an image is.
func (c *cli) setContainer(t *shoalv1.TaskSpec, cf *containerFlags, noun, image string, command []string, service, noHealth bool) error {
	ct, err := cf.container(image)
	if err != nil {
		return err
	}
	if image == "" {
		return spec.TaskSpec{Command: command, Container: ct}.Validate()
	}
	if err := checkImage(noun, image, command); err != nil {
		return err
	}
	ts, err := api.ToTaskSpec(t)
	if err != nil {
		return err
	}
	if !service || cf.registryAuth {
		if ct.RegistryAuth, err = registryAuth(image); err != nil {
			return err
		}
	}
	ts.Container = ct
	if noHealth {
		ts.Health = &spec.HealthCheck{Disabled: true}
		t.Health = api.HealthCheck(ts.Health)
	}
	if err := ts.Validate(); err != nil {
		return err
	}
	t.Container = api.Container(ct)
	return nil
}

// pinImage is pin for a service that is to be made.
func (c *cli) pinImage(ctx context.Context, t *shoalv1.TaskSpec, cf *containerFlags, noun, image string, command []string) error {
	if t.Container == nil || cf.noResolve || t.Container.Pull == spec.PullNever {
		return nil
	}
	ct := api.ToContainer(t.Container)
	why, err := c.pin(ctx, "", &ct)
	if err != nil {
		return err
	}
	if why != "" {
		fmt.Fprintf(c.err, "shoal: %s%s: its digest could not be found out; each node takes the image as it finds it, perhaps another one\n", why, looksLikeProgram(noun, image, command))
	}
	t.Container = api.Container(ct)
	return nil
}
