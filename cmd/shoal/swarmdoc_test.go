package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestFromSwarm: every command that docs/from-swarm.md sends people to is there, and
// no command with a line of its own in Docker's help of these nouns is left out.
func TestFromSwarm(t *testing.T) {
	b, err := os.ReadFile("../../docs/from-swarm.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, m := range regexp.MustCompile("`shoal ([^`]*)`").FindAllStringSubmatch(text, -1) {
		var words []string
		for _, w := range strings.Fields(m[1]) {
			if strings.HasPrefix(w, "-") {
				break
			}
			words = append(words, w)
		}
		root := (&cli{}).root()
		cmd, rest, err := root.Find(words)
		if err != nil || cmd == root || cmd.HasSubCommands() && len(rest) > 0 || strings.Join(append(strings.Fields(cmd.CommandPath())[1:], rest...), " ") != strings.Join(words, " ") {
			t.Errorf("`shoal %s` is no command", m[1])
		}
	}
	for noun, verbs := range map[string]string{
		"swarm": "init join leave join-token ca unlock unlock-key update", "node": "ls inspect ps promote demote update rm",
		"service": "create update scale ls ps inspect logs rm rollback", "network": "create connect disconnect ls inspect rm prune",
		"stack": "deploy ls ps rm services", "image": "ls inspect rm prune", "volume": "create ls inspect rm prune",
		"secret": "create ls inspect rm", "config": "create ls inspect rm",
	} {
		for _, v := range strings.Fields(verbs) {
			if !strings.Contains(text, "`"+noun+" "+v) {
				t.Errorf("docker %s %s is not in the page", noun, v)
			}
		}
	}
}
