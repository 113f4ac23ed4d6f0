package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// dockerWords are Docker's commands that Shoal has not, each with what there is
// instead. A noun alone stands for those of its verbs that have no line. What
// Shoal has is in quotes, beginning with shoal: a test looks that it is there, and
// that what stands in front is not, so that a line goes when its feature comes.
var dockerWords = []struct{ docker, instead string }{
	{"swarm", "use 'shoal init', 'shoal join', 'shoal leave', 'shoal token', 'shoal ca' and 'shoal node ls'"},
	{"swarm init", "use 'shoal init'"},
	{"swarm join", "use 'shoal join'"},
	{"swarm leave", "use 'shoal leave'"},
	{"swarm join-token", "use 'shoal token show worker' (or manager), and 'shoal token rotate'"},
	{"swarm ca", "use 'shoal ca show' and 'shoal ca rotate'"},
	{"swarm unlock", "use 'shoal unlock'"},
	{"swarm unlock-key", "use 'shoal unlock-key', with --rotate for another"},
	{"swarm update", "what 'shoal init' sets stays; nodes change by 'shoal node update'"},

	{"stack", "there are no stacks: make each service with 'shoal svc create', each network with 'shoal net create'"},
	{"stack ls", "there are no stacks: 'shoal svc ls' lists the services"},
	{"stack ps", "there are no stacks: 'shoal svc ps SERVICE' lists a service's tasks"},
	{"stack services", "there are no stacks: 'shoal svc ls' lists the services, with '--filter label=KEY=VALUE' those of one label"},
	{"stack rm", "there are no stacks: 'shoal svc rm SERVICE...' removes services"},
	{"compose", "there is no compose: make each service with 'shoal svc create', each network with 'shoal net create'"},

	{"container", "what runs is a task: see 'shoal run', 'shoal exec', 'shoal ps', 'shoal logs', 'shoal stop' and 'shoal rm'"},
	{"container inspect", "use 'shoal inspect'"},
	{"container wait", "use 'shoal wait'"},
	{"container ls", "use 'shoal ps'"},
	{"container ps", "use 'shoal ps'"},
	{"container run", "use 'shoal run'"},
	{"container exec", "use 'shoal exec'"},
	{"container cp", "use 'shoal cp'"},
	{"container start", "use 'shoal start'"},
	{"container restart", "use 'shoal restart'"},
	{"container rename", "use 'shoal rename'"},
	{"container logs", "use 'shoal logs'"},
	{"container stop", "use 'shoal stop'"},
	{"container rm", "use 'shoal rm'"},
	{"container port", "use 'shoal port'"},
	{"container stats", "use 'shoal stats'"},
	{"container kill", "use 'shoal kill'"},
	{"container top", "use 'shoal top'"},
	{"container attach", "use 'shoal attach'"},
	{"container prune", "'shoal ps -a --filter status=exited -q' lists what has ended, 'shoal rm TASK...' removes it"},
	{"prune", "'shoal ps -a --filter status=exited -q' lists what has ended, 'shoal rm TASK...' removes it"},
	{"create", "'shoal run -d' makes a task and starts it, 'shoal svc create' makes a service"},
	{"pause", "use 'shoal kill -s STOP TASK', of a task of one process"},
	{"unpause", "use 'shoal kill -s CONT TASK'"},
	{"update", "'shoal svc update' changes a service; a task stays as it was made"},
	{"diff", "a task works on the node's own files: there is nothing to compare"},
	{"commit", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"export", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},

	{"build", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"builder", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"buildx", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"push", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"history", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"import", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"tag", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"manifest", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"trust", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"scout", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},
	{"search", "images are made and pushed with docker or another tool; 'shoal image' has ls, pull, load, save, inspect, rm and prune"},

	{"plugin", "there are no plugins"},
	{"checkpoint", "there are no checkpoints"},
	{"context", "name another agent's socket with '--socket PATH' or $SHOAL_SOCKET"},

	{"system", "use 'shoal info', 'shoal events' and 'shoal doctor'"},
	{"system info", "use 'shoal info'"},
	{"system events", "use 'shoal events'"},
	{"system prune", "use 'shoal net prune' for networks, 'shoal rm TASK...' for tasks that have ended"},
	{"system df", "see 'shoal image ls' and 'shoal volume ls' of each node"},
}

// plainVerbs are other spellings of Docker's verbs.
var plainVerbs = map[string]string{"list": "ls", "remove": "rm", "up": "deploy", "down": "rm"}

// insteadOf is what there is instead of a command of Docker's, "" when it is none.
// Verbs of tasks go with and without their noun.
func insteadOf(words []string) string {
	for i, w := range words {
		if plain := plainVerbs[w]; i > 0 && plain != "" {
			words = slices.Replace(slices.Clone(words), i, i+1, plain)
		}
	}
	keys := []string{strings.Join(words, " "), words[0]}
	if len(words) > 1 && words[0] == "container" {
		keys = slices.Insert(keys, 1, words[1])
	}
	for _, k := range keys {
		for _, d := range dockerWords {
			if d.docker == k {
				return d.instead
			}
		}
	}
	return ""
}

// unknownCommand tells of a word where a command should be. It is asked before
// flags are looked at: those of a command that does not exist can't be wrong.
func unknownCommand(root *cobra.Command, args []string) error {
	cmd := root
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "--" || strings.HasPrefix(a, "__"): // the hidden commands of completion
			return nil
		case strings.HasPrefix(a, "-"):
			f := cmd.Flags().Lookup(strings.TrimLeft(a, "-"))
			if f == nil {
				f = cmd.InheritedFlags().Lookup(strings.TrimLeft(a, "-"))
			}
			if f == nil {
				f = root.PersistentFlags().Lookup(strings.TrimLeft(a, "-"))
			}
			switch {
			case strings.Contains(a, "="), a == "-h", a == "--help":
			case f == nil:
				return nil // whether the next word is its value is not known
			case f.NoOptDefVal == "":
				i++
			}
			continue
		case a == "help" && cmd == root:
			continue
		}
		at := slices.IndexFunc(cmd.Commands(), func(s *cobra.Command) bool { return s.Name() == a || s.HasAlias(a) })
		if at < 0 {
			// Of Docker's command no more than noun and verb counts.
			var verb []string
			if i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
				verb = args[i+1 : i+2]
			}
			return unknownWord(cmd, a, verb...)
		}
		if cmd = cmd.Commands()[at]; !cmd.HasSubCommands() || cmd.Name() == "completion" {
			return nil
		}
	}
	return nil
}

// unknownWord is the mistake of a word behind a command that has none such.
func unknownWord(cmd *cobra.Command, word string, more ...string) error {
	words := append(strings.Fields(cmd.CommandPath())[1:], word)
	if len(words) == 1 {
		if s := insteadOf(append(words, more...)); s != "" {
			if key := strings.Join(append(words, more...), " "); len(more) > 0 && slices.ContainsFunc(dockerWords, func(d struct{ docker, instead string }) bool { return d.docker == key }) {
				word = key
			}
			return usageError(cmd, fmt.Errorf("unknown command %q: %s", cmd.CommandPath()+" "+word, s))
		}
	} else if s := insteadOf(words); s != "" {
		return usageError(cmd, fmt.Errorf("unknown command %q: %s", cmd.CommandPath()+" "+word, s))
	}
	msg := fmt.Errorf("unknown command %q", cmd.CommandPath()+" "+word)
	if near := cmd.SuggestionsFor(word); word != "" && len(near) > 0 {
		far := func(s string) int {
			n := len(s) - len(word)
			n = 2 * max(n, -n)
			if s[:1] != word[:1] {
				n += 10
			}
			if strings.HasPrefix(word, s) || strings.HasPrefix(s, word) {
				n--
			}
			return n
		}
		msg = fmt.Errorf("%w: did you mean %q?", msg, slices.MinFunc(near, func(a, b string) int { return cmp.Compare(far(a), far(b)) }))
	}
	return usageError(cmd, msg)
}
