package agent

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestSocketGroup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	// The packages make the default one: without a package there is none.
	for _, name := range []string{"", DefaultSocketGroup, "root"} {
		if err := giveToGroup(path, name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := giveToGroup(path, "no-such-group"); err == nil || !strings.Contains(err.Error(), "--socket-group no-such-group") || !strings.Contains(err.Error(), "groupadd") {
		t.Errorf("a group that is not there: %v", err)
	}
}
