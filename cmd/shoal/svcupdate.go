package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	shellquote "github.com/kballard/go-shellquote"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) svcUpdate() *cobra.Command {
	var replicas int32
	var publishAdd, publishRm, networkAdd, networkRm, envAdd, envRm, labelAdd, labelRm, constraintAdd, constraintRm []string
	var dnsAdd, dnsRm, hostAdd, hostRm []string
	var taskLabelAdd, taskLabelRm, searchAdd, searchRm, optionAdd, optionRm, exposeAdd, exposeRm, linkAdd, linkRm, aliasAdd, aliasRm, envFile, labelFile []string
	var image, entrypoint string
	var cf containerFlags
	var mountRm, tmpfsRm, groupRm, ulimitRm, sysctlRm, deviceRm []string
	var registryAuthToo, noResolve bool
	var command, hostname, mode, user, dir, stopSignal, vip, logDriver string
	var logOpts []string
	var tty bool
	var grace, restartDelay, restartWindow, listenTimeout time.Duration
	var prefAdd, prefRm []string
	var maxPerNode, maxConcurrent int32
	var restartCondition string
	var restartMax int32
	var health healthFlags
	var resources resourceFlags
	var secretAdd, secretRm, configAdd, configRm []string
	var detach, quiet, force, rollback bool
	var policy, back policyFlags
	cmd := &cobra.Command{Use: "update SERVICE [-- COMMAND [ARG...]]", Short: "Change a service", Args: atLeast(1),
		Long: `Update changes a running service. Networks, published ports, labels and the
number of replicas change without a restart; another command, environment,
host name or resolver replaces the replicas one after the other, each new one
running before the old one ends (--update-order, --update-parallelism). When a new
one fails, or finds no node, within --update-monitor, the update pauses and the old
ones run on (--update-failure-action). Another update resumes it; --rollback, or
'shoal svc rollback', takes it back.`,
		Example: `  shoal svc update --publish-add 8443:443 --publish-rm 8080 web
  shoal svc update --network-add name=backend,alias=www web
  shoal svc update --env-add LEVEL=debug web
  shoal svc update --update-failure-action rollback --image nginx:1.27 web
  shoal svc update --update-order stop-first --env-add V=2 db    # what can't run twice
  shoal svc update --force web                                   # restart, and spread anew
  shoal svc update web -- nginx -c /etc/nginx/new.conf -g 'daemon off;'`,
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, f := cmd.Context(), cmd.Flags()
			if rollback {
				given := len(args) > 1
				f.Visit(func(x *pflag.Flag) {
					given = given || cmd.InheritedFlags().Lookup(x.Name) == nil && !slices.Contains([]string{"rollback", "detach", "quiet"}, x.Name)
				})
				if given {
					return usageError(cmd, fmt.Errorf("other flags may not be combined with --rollback"))
				}
				return c.rollback(ctx, args[0], detach, quiet)
			}
			if _, err := spec.ParseLog(logDriver, logOpts); err != nil {
				return usageError(cmd, err)
			}
			svcs, err := c.services(ctx, args[0])
			if err != nil {
				return err
			}
			svc := svcs[0]
			sp := svc.Spec
			changed := len(args) > 1
			if changed {
				sp.Task.Command = spec.Texts(args[1:])
			}
			set := func(flag string, fn func() error) {
				if f.Changed(flag) && err == nil {
					changed = true
					err = fn()
				}
			}
			set("replicas", func() error {
				if global(sp.Mode) {
					return fmt.Errorf("%w: service %s is %s", errReplicas, sp.Name, sp.Mode)
				}
				sp.Replicas = replicas
				return nil
			})
			set("max-concurrent", func() error { sp.MaxConcurrent = maxConcurrent; return nil })
			set("replicas-max-per-node", func() error { sp.MaxPerNode = maxPerNode; return nil })
			set("placement-pref-rm", func() error {
				rm, err := spreads(prefRm)
				sp.Spread = drop(sp.Spread, rm)
				return err
			})
			set("placement-pref-add", func() error {
				add, err := spreads(prefAdd)
				sp.Spread = more(sp.Spread, add)
				return err
			})
			set("restart-condition", func() error { sp.RestartCondition = restartCondition; return nil })
			set("restart-window", func() error { sp.RestartWindowMs = restartWindow.Milliseconds(); return nil })
			set("args", func() error {
				words, err := shellquote.Split(command)
				if err != nil {
					return fmt.Errorf("--args %q: %w", command, err)
				}
				if sp.Task.Container != nil {
					sp.Task.Command = spec.Texts(words) // behind the image's entrypoint, as in Docker
					return nil
				}
				sp.Task.Command = append(sp.Task.Command[:1:1], spec.Texts(words)...)
				return nil
			})
			set("image", func() error {
				if sp.Task.Container == nil {
					return fmt.Errorf("service %s runs a program of the nodes, no image: make another service of the image", sp.Name)
				}
				if err := checkImage("svc create", image, nil); err != nil {
					return err
				}
				ct := api.ToContainer(sp.Task.Container)
				ct.Image = image
				if registryAuthToo {
					auth, err := registryAuth(image)
					if err != nil {
						return err
					}
					ct.RegistryAuth = auth
				}
				if !noResolve {
					why, err := c.pin(ctx, "", &ct)
					if err != nil {
						return err
					}
					if why != "" {
						fmt.Fprintf(c.err, "shoal: %s: its digest could not be found out; each node takes the image as it finds it, perhaps another one\n", why)
					}
				}
				sp.Task.Container = api.Container(ct)
				return nil
			})
			set("entrypoint", func() error {
				if sp.Task.Container == nil {
					return fmt.Errorf("service %s runs a program of the nodes: --entrypoint is for images", sp.Name)
				}
				sp.Task.Container.Entrypoint = []string{entrypoint}
				return nil
			})
			add, err2 := cf.container("")
			if err2 != nil {
				return usageError(cmd, err2)
			}
			// Of an image: what its flags say goes into what is there.
			onImage := func(flag string, fn func(ct *spec.Container)) {
				set(flag, func() error {
					if sp.Task.Container == nil {
						return fmt.Errorf("service %s runs a program of the nodes: --%s is for images", sp.Name, flag)
					}
					ct := api.ToContainer(sp.Task.Container)
					fn(&ct)
					sp.Task.Container = api.Container(ct)
					return nil
				})
			}
			onImage("cap-add", func(ct *spec.Container) {
				ct.CapDrop, ct.CapAdd = drop(ct.CapDrop, add.CapAdd), more(ct.CapAdd, add.CapAdd)
			})
			onImage("cap-drop", func(ct *spec.Container) {
				ct.CapAdd, ct.CapDrop = drop(ct.CapAdd, add.CapDrop), more(ct.CapDrop, add.CapDrop)
			})
			onImage("mount-rm", func(ct *spec.Container) {
				ct.Mounts = slices.DeleteFunc(ct.Mounts, func(m spec.Mount) bool { return slices.Contains(mountRm, m.Target) })
			})
			for _, flag := range []string{"mount-add", "tmpfs-add"} {
				onImage(flag, func(ct *spec.Container) {
					for _, m := range add.Mounts {
						ct.Mounts = append(slices.DeleteFunc(ct.Mounts, func(o spec.Mount) bool { return o.Target == m.Target }), m)
					}
				})
			}
			onImage("tmpfs-rm", func(ct *spec.Container) {
				ct.Mounts = slices.DeleteFunc(ct.Mounts, func(m spec.Mount) bool {
					return m.Type == spec.MountTmpfs && slices.Contains(tmpfsRm, m.Target)
				})
			})
			onImage("group-rm", func(ct *spec.Container) { ct.Groups = drop(ct.Groups, groupRm) })
			onImage("group-add", func(ct *spec.Container) { ct.Groups = more(ct.Groups, add.Groups) })
			onImage("ulimit-rm", func(ct *spec.Container) { ct.Ulimits = dropKeys(ct.Ulimits, ulimitRm) })
			onImage("ulimit-add", func(ct *spec.Container) {
				ct.Ulimits = append(dropKeys(ct.Ulimits, each1(add.Ulimits, key)), add.Ulimits...)
			})
			onImage("sysctl-rm", func(ct *spec.Container) {
				for _, k := range sysctlRm {
					delete(ct.Sysctls, k)
				}
			})
			onImage("sysctl-add", func(ct *spec.Container) { ct.Sysctls = merged(ct.Sysctls, add.Sysctls) })
			onImage("device-rm", func(ct *spec.Container) { ct.Devices = drop(ct.Devices, deviceRm) })
			onImage("device-add", func(ct *spec.Container) { ct.Devices = more(ct.Devices, add.Devices) })
			onImage("read-only", func(ct *spec.Container) { ct.ReadOnly = add.ReadOnly })
			onImage("privileged", func(ct *spec.Container) { ct.Privileged = add.Privileged })
			onImage("init", func(ct *spec.Container) { ct.Init = add.Init })
			onImage("pull", func(ct *spec.Container) { ct.Pull = add.Pull })
			onImage("shm-size", func(ct *spec.Container) { ct.ShmSize = add.ShmSize })
			onImage("security-opt", func(ct *spec.Container) { ct.SecurityOpt = add.SecurityOpt })
			set("user", func() error { sp.Task.User = spec.Text(user); return nil })
			set("workdir", func() error { sp.Task.Dir = spec.Text(dir); return nil })
			// As with Docker: options go with the driver that they are of.
			set("log-driver", func() error { sp.Task.Log = &shoalv1.LogConfig{Driver: logDriver}; return nil })
			set("log-opt", func() error {
				kept, err := spec.ParseLog(sp.Task.Log.GetDriver(), logOpts)
				sp.Task.Log = api.LogConfig(kept)
				return err
			})
			set("tty", func() error { sp.Task.Tty = tty; return nil })
			set("stop-signal", func() error { sp.Task.StopSignal = stopSignal; return nil })
			set("restart-delay", func() error { sp.RestartDelayMs = restartDelay.Milliseconds(); return nil })
			set("listen-timeout", func() (err error) {
				sp.ListenTimeoutMs, err = listenTimeoutMs(listenTimeout)
				return err
			})
			set("restart-max-attempts", func() error { sp.RestartMax = restartMax; return nil })
			set("container-label-rm", func() error {
				for _, k := range taskLabelRm {
					delete(sp.Task.Labels, spec.Text(k))
				}
				return nil
			})
			set("container-label-add", func() error {
				add, err := labels(taskLabelAdd)
				sp.Task.Labels = merged(sp.Task.Labels, add)
				return err
			})
			set("dns-search-rm", func() error { sp.Task.DnsSearch = drop(sp.Task.DnsSearch, searchRm); return nil })
			set("dns-search-add", func() error { sp.Task.DnsSearch = more(sp.Task.DnsSearch, searchAdd); return nil })
			set("dns-option-rm", func() error { sp.Task.DnsOptions = drop(sp.Task.DnsOptions, optionRm); return nil })
			set("dns-option-add", func() error { sp.Task.DnsOptions = more(sp.Task.DnsOptions, optionAdd); return nil })
			set("expose-rm", func() error { sp.Task.Expose = drop(sp.Task.Expose, exposeRm); return nil })
			set("expose-add", func() error { sp.Task.Expose = more(sp.Task.Expose, exposeAdd); return nil })
			set("link-rm", func() error {
				sp.Task.Links = slices.DeleteFunc(slices.Clone(sp.Task.Links), func(l string) bool {
					_, alias := spec.ParseLink(l)
					return slices.Contains(linkRm, l) || slices.Contains(linkRm, alias)
				})
				return nil
			})
			set("link-add", func() error {
				// Only the new ones bring variables.
				t := &shoalv1.TaskSpec{Links: linkAdd}
				if err := c.api().Link(ctx, t, sp.Name, sp.Networks); err != nil {
					return err
				}
				sp.Task.Links = more(sp.Task.Links, t.Links)
				sp.Task.Env = append(dropKeys(sp.Task.Env, each1(t.Env, key)), t.Env...)
				return nil
			})
			set("network-alias-rm", func() error {
				for _, a := range sp.Networks {
					a.Aliases = drop(a.Aliases, aliasRm)
				}
				return nil
			})
			set("hostname", func() error { sp.Task.Hostname = hostname; return nil })
			set("endpoint-mode", func() error { sp.EndpointMode = mode; return nil })
			set("stop-grace-period", func() error { sp.Task.StopGraceMs = grace.Milliseconds(); return nil })
			set("env-rm", func() error { sp.Task.Env = dropKeys(sp.Task.Env, spec.Texts(envRm)); return nil })
			set("env-file", func() error {
				tf := taskFlags{envFile: envFile}
				t, err := tf.spec(nil)
				sp.Task.Env = append(dropKeys(sp.Task.Env, each1(t.GetEnv(), key)), t.GetEnv()...)
				return err
			})
			set("env-add", func() error {
				tf := taskFlags{env: envAdd}
				t, err := tf.spec(nil)
				sp.Task.Env = append(dropKeys(sp.Task.Env, each1(t.GetEnv(), key)), t.GetEnv()...)
				return err
			})
			set("label-rm", func() error {
				for _, k := range labelRm {
					delete(sp.Labels, spec.Text(k))
				}
				return nil
			})
			set("label-add", func() error {
				add, err := labels(labelAdd)
				sp.Labels = merged(sp.Labels, add)
				return err
			})
			set("label-file", func() error {
				lines, err := fileLines("--label-file", labelFile)
				if err != nil {
					return err
				}
				add, err := labels(lines)
				sp.Labels = merged(sp.Labels, add)
				return err
			})
			set("constraint-rm", func() error { sp.Constraints = drop(sp.Constraints, constraintRm); return nil })
			set("constraint-add", func() error { sp.Constraints = more(sp.Constraints, constraintAdd); return nil })
			set("dns-rm", func() error { sp.Task.Dns = drop(sp.Task.Dns, dnsRm); return nil })
			set("dns-add", func() error { sp.Task.Dns = more(sp.Task.Dns, dnsAdd); return nil })
			set("host-rm", func() error { sp.Task.ExtraHosts = dropHosts(sp.Task.ExtraHosts, hostRm); return nil })
			set("host-add", func() error { sp.Task.ExtraHosts = more(sp.Task.ExtraHosts, hostAdd); return nil })
			set("network-rm", func() error {
				for _, n := range networkRm {
					nets, _, err := c.networks(ctx, n)
					if err != nil {
						return err
					}
					sp.Networks = slices.DeleteFunc(sp.Networks, func(a *shoalv1.NetworkAttachment) bool { return a.Network == nets[0].Id })
				}
				return nil
			})
			set("network-add", func() error {
				tf := taskFlags{networks: networkAdd}
				add, err := tf.attachments()
				sp.Networks = append(sp.Networks, add...)
				return err
			})
			set("network-alias-add", func() error {
				for _, a := range sp.Networks {
					a.Aliases = more(a.Aliases, aliasAdd)
				}
				return nil
			})
			set("vip", func() error {
				if len(sp.Networks) > 0 {
					sp.Networks[0].Addrs = []string{vip}
				}
				return nil
			})
			set("publish-rm", func() error { sp.Ports, err = withoutPorts(svc, publishRm); return err })
			set("publish-add", func() error {
				add, err := client.ParsePublishes(publishAdd, spec.PortIngress)
				sp.Ports = morePorts(sp.Ports, api.Ports(add))
				return err
			})
			if err == nil {
				was := sp.Task.Health
				sp.Task.Health, err = health.apply(was)
				changed = changed || !proto.Equal(was, sp.Task.Health)
			}
			set("secret-rm", func() (err error) {
				sp.Task.Secrets, err = changeBlobs(spec.KindSecret, sp.Task.Secrets, secretRm, nil)
				return err
			})
			set("secret-add", func() (err error) {
				sp.Task.Secrets, err = changeBlobs(spec.KindSecret, sp.Task.Secrets, nil, secretAdd)
				return err
			})
			set("config-rm", func() (err error) {
				sp.Task.Configs, err = changeBlobs(spec.KindConfig, sp.Task.Configs, configRm, nil)
				return err
			})
			set("config-add", func() (err error) {
				sp.Task.Configs, err = changeBlobs(spec.KindConfig, sp.Task.Configs, nil, configAdd)
				return err
			})
			if err == nil {
				was := api.ToResources(sp.Task.Resources)
				now, rerr := resources.apply(was)
				sp.Task.Resources, err = api.Resources(now), rerr
				changed = changed || now != was
			}
			if err != nil {
				return usageError(cmd, err)
			}
			if policy.given() || back.given() {
				sp.Update, sp.Rollback = policy.apply(sp.Update), back.apply(sp.Rollback)
				changed = true
			}
			if force {
				sp.ForceUpdate++
				changed = true
			}
			if len(sp.Networks) == 0 {
				return fmt.Errorf("service %s would be on no network: add another with --network-add", sp.Name)
			}
			if !changed {
				return usageError(cmd, errNoChange)
			}
			updated, err := c.api().UpdateService(ctx, &shoalv1.UpdateServiceRequest{Ref: svc.Id, Version: svc.Version, Spec: sp})
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, sp.Name)
			if updated.GetUpdateStatus().GetState() == spec.Updating && sp.Update.GetOrder() != spec.StopFirst &&
				slices.ContainsFunc(sp.Ports, func(p *shoalv1.Port) bool { return p.Mode == spec.PortHost }) {
				fmt.Fprintf(c.err, "shoal: service %s publishes a port of the node (mode=host): where no other node has it free, a replica is stopped before the next one starts\n", sp.Name)
			}
			if detach {
				return nil
			}
			return c.converge(ctx, updated, quiet)
		}}
	f := cmd.Flags()
	cf.addUpdate(f)
	policy.add(cmd, "update")
	back.add(cmd, "rollback")
	f.BoolVar(&force, "force", false, "replace all replicas, even if nothing changes that needs it")
	f.BoolVar(&rollback, "rollback", false, "go back to the spec before the last change")
	for _, l := range []struct {
		to         *[]string
		name, what string
	}{{&mountRm, "mount-rm", "mount to take away, by its target"}, {&tmpfsRm, "tmpfs-rm", "tmpfs to take away, by its target"}, {&groupRm, "group-rm", "group of the user to take away"},
		{&ulimitRm, "ulimit-rm", "limit to take away, by its name"}, {&sysctlRm, "sysctl-rm", "kernel parameter to take away, by its name"}, {&deviceRm, "device-rm", "device to take away"}} {
		f.StringArrayVar(l.to, l.name, nil, l.what+" (repeatable)")
	}
	f.StringVar(&image, "image", "", "another image")
	f.StringVar(&entrypoint, "entrypoint", "", "command line instead of the image's entrypoint")
	f.BoolVar(&registryAuthToo, "with-registry-auth", false, "send this user's login of the registry to the nodes")
	f.BoolVar(&noResolve, "no-resolve-image", false, "don't pin the image to the digest that it has now")
	f.Int32Var(&replicas, "replicas", 0, "number of tasks")
	f.StringVar(&command, "args", "", "arguments of the command, with quotes as a shell has them")
	f.StringVarP(&user, "user", "u", "", "user or uid, and group: NAME[:GROUP]")
	f.StringVarP(&dir, "workdir", "w", "", "working directory")
	f.StringVar(&logDriver, "log-driver", "", logDriverHelp)
	f.StringArrayVar(&logOpts, "log-opt", nil, logOptHelp+": all of them, those that are not given go")
	f.BoolVarP(&tty, "tty", "t", false, "give each replica a terminal")
	f.StringVar(&stopSignal, "stop-signal", "", "signal that asks the program to stop")
	f.StringArrayVar(&prefAdd, "placement-pref-add", nil, placementPrefHelp)
	f.StringArrayVar(&prefRm, "placement-pref-rm", nil, "remove a placement preference, spread=node.labels.KEY")
	f.Int32Var(&maxConcurrent, "max-concurrent", 0, "tasks of a replicated-job that run at once (0: all)")
	f.Int32Var(&maxPerNode, "replicas-max-per-node", 0, "most replicas on one node (0: no limit)")
	f.StringVar(&restartCondition, "restart-condition", "", restartConditionHelp)
	f.DurationVar(&restartWindow, "restart-window", 0, restartWindowHelp)
	completeConditions(cmd)
	f.DurationVar(&restartDelay, "restart-delay", 0, "wait before the first restart; doubles up to 30s")
	f.DurationVar(&listenTimeout, "listen-timeout", 0, listenTimeoutHelp)
	f.Int32Var(&restartMax, "restart-max-attempts", 0, "restarts of a replica before it is given up (0: no limit)")
	f.StringVar(&vip, "vip", "", "virtual IP on the first network")
	f.StringArrayVar(&envFile, "env-file", nil, "set the environment variables of a file")
	f.StringArrayVar(&labelFile, "label-file", nil, "set the labels of a file")
	f.StringArrayVar(&taskLabelAdd, "container-label-add", nil, "set a label of the tasks, key=value")
	f.StringArrayVar(&taskLabelRm, "container-label-rm", nil, "remove a label of the tasks, by key")
	f.StringSliceVar(&searchAdd, "dns-search-add", nil, "add a search domain")
	f.StringSliceVar(&searchRm, "dns-search-rm", nil, "remove a search domain")
	f.StringSliceVar(&optionAdd, "dns-option-add", nil, "add a resolv.conf option")
	f.StringSliceVar(&optionRm, "dns-option-rm", nil, "remove a resolv.conf option")
	f.StringSliceVar(&exposeAdd, "expose-add", nil, "add a port that is served, PORT[/PROTOCOL]")
	f.StringSliceVar(&exposeRm, "expose-rm", nil, "remove such a port")
	f.StringArrayVar(&linkAdd, "link-add", nil, "know a task or service by another name, NAME:ALIAS")
	f.StringArrayVar(&linkRm, "link-rm", nil, "forget such a name, by alias")
	f.StringSliceVar(&aliasAdd, "network-alias-add", nil, "add a name on every network of the service")
	f.StringSliceVar(&aliasRm, "network-alias-rm", nil, "remove such a name")
	f.StringVar(&hostname, "hostname", "", "host name inside the tasks")
	f.StringVar(&mode, "endpoint-mode", "", "vip or dnsrr")
	f.DurationVar(&grace, "stop-grace-period", 0, "time between the stop signal and the kill")
	f.StringArrayVar(&publishAdd, "publish-add", nil, "publish a port, as with svc create --publish")
	f.StringArrayVar(&publishRm, "publish-rm", nil, "stop publishing: the target port, PUBLISHED:TARGET, or the published port")
	f.StringArrayVar(&networkAdd, "network-add", nil, "attach to a network, as with svc create --network")
	f.StringArrayVar(&networkRm, "network-rm", nil, "leave a network")
	f.StringArrayVar(&envAdd, "env-add", nil, "set an environment variable, KEY=value")
	f.StringArrayVar(&envRm, "env-rm", nil, "remove an environment variable, by key")
	f.StringArrayVar(&labelAdd, "label-add", nil, "set a label, key=value")
	f.StringArrayVar(&labelRm, "label-rm", nil, "remove a label, by key")
	f.StringArrayVar(&constraintAdd, "constraint-add", nil, "add a placement constraint")
	f.StringArrayVar(&constraintRm, "constraint-rm", nil, "remove a placement constraint")
	f.StringArrayVar(&dnsAdd, "dns-add", nil, "add a resolver")
	f.StringArrayVar(&dnsRm, "dns-rm", nil, "remove a resolver")
	f.StringArrayVar(&hostAdd, "host-add", nil, "add a line of /etc/hosts, NAME:ADDRESS")
	f.StringArrayVar(&hostRm, "host-rm", nil, "remove such a line, or with a NAME alone all of that name")
	health.add(f)
	resources.add(f, true)
	f.StringArrayVar(&secretAdd, "secret-add", nil, "give a secret, as with svc create --secret (repeatable)")
	f.StringArrayVar(&secretRm, "secret-rm", nil, "take a secret away, by name (repeatable)")
	f.StringArrayVar(&configAdd, "config-add", nil, "give a config, as with svc create --config (repeatable)")
	f.StringArrayVar(&configRm, "config-rm", nil, "take a config away, by name (repeatable)")
	_ = cmd.RegisterFlagCompletionFunc("secret-add", c.completeBlobs(spec.KindSecret))
	_ = cmd.RegisterFlagCompletionFunc("config-add", c.completeBlobs(spec.KindConfig))
	f.BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	f.BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	_ = cmd.RegisterFlagCompletionFunc("endpoint-mode", cobra.FixedCompletions([]string{"vip", "dnsrr"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("network-add", c.complete(c.networkNames))
	of := func(list func(*shoalv1.Service) []string) cobra.CompletionFunc {
		return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			svcs, err := c.services(cmd.Context(), args[0])
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return list(svcs[0]), cobra.ShellCompDirectiveNoFileComp
		}
	}
	_ = cmd.RegisterFlagCompletionFunc("publish-rm", of(func(s *shoalv1.Service) []string {
		return each1(s.Ports, func(p *shoalv1.Port) string {
			if p.Protocol == spec.TCP {
				return fmt.Sprint(p.Target)
			}
			return fmt.Sprintf("%d/%s", p.Target, p.Protocol)
		})
	}))
	_ = cmd.RegisterFlagCompletionFunc("network-rm", of(func(s *shoalv1.Service) []string {
		_, nets, _ := c.networks(cmd.Context())
		return each1(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) string { return nets.Of(a.Network) })
	}))
	_ = cmd.RegisterFlagCompletionFunc("env-rm", of(func(s *shoalv1.Service) []string { return each1(s.GetSpec().GetTask().GetEnv(), key) }))
	_ = cmd.RegisterFlagCompletionFunc("label-rm", of(func(s *shoalv1.Service) []string { return slices.Sorted(maps.Keys(s.GetSpec().GetLabels())) }))
	_ = cmd.RegisterFlagCompletionFunc("constraint-rm", of(func(s *shoalv1.Service) []string { return s.GetSpec().GetConstraints() }))
	return cmd
}

func key(kv string) string { k, _, _ := strings.Cut(kv, "="); return k }

// dropKeys removes KEY=value items by key.
func dropKeys(in, keys []string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(e string) bool { return slices.Contains(keys, key(e)) })
}

// more adds what is not there yet.
func more(in, items []string) []string { return append(drop(in, items), items...) }

// merged is m with what add has.
func merged(m, add map[string]string) map[string]string {
	if m == nil {
		m = map[string]string{}
	}
	maps.Copy(m, add)
	return m
}

func drop(in, items []string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(e string) bool { return slices.Contains(items, e) })
}

// dropHosts removes lines of /etc/hosts: NAME:ADDRESS, or all of a NAME.
func dropHosts(in, rm []string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(h string) bool {
		name, addr, err := spec.ParseExtraHost(h)
		return slices.ContainsFunc(rm, func(r string) bool {
			n, a, rerr := spec.ParseExtraHost(r)
			return h == r || err == nil && (name == r || rerr == nil && n == name && a == addr)
		})
	})
}

// morePorts adds published ports, but for those that are there: in the same mode, too.
func morePorts(in, add []*shoalv1.Port) []*shoalv1.Port {
	out := slices.Clone(in)
	for _, p := range add {
		if !slices.ContainsFunc(in, func(o *shoalv1.Port) bool { return proto.Equal(o, p) }) {
			out = append(out, p)
		}
	}
	return out
}

// withoutPorts removes published ports: by target port, as Docker has it, by both
// numbers, or by the published one where no target has the number. As with Docker
// one that is not published may be taken away, so that a script may be run again.
func withoutPorts(svc *shoalv1.Service, rm []string) ([]*shoalv1.Port, error) {
	// A dynamic port's number is not in the spec.
	numbers := map[*shoalv1.Port]uint32{}
	for i, w := range svc.Spec.Ports {
		numbers[w] = w.Published
		if i < len(svc.Ports) {
			numbers[w] = svc.Ports[i].Published
		}
	}
	left := slices.Clone(svc.Spec.Ports)
	for _, r := range rm {
		ps, err := client.ParsePublish(r, spec.PortIngress)
		if err != nil {
			return nil, err
		}
		for _, p := range ps {
			is := func(w *shoalv1.Port) bool {
				return w.Target == uint32(p.Target) && w.Protocol == p.Protocol && (p.Published == 0 || numbers[w] == uint32(p.Published))
			}
			if p.Published == 0 && !slices.ContainsFunc(left, is) {
				is = func(w *shoalv1.Port) bool { return numbers[w] == uint32(p.Target) && w.Protocol == p.Protocol }
			}
			left = slices.DeleteFunc(left, is)
		}
	}
	return left, nil
}
