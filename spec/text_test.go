package spec

import (
	"encoding/json"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

// TestText: whatever bytes come in, they are text in between, which survives JSON,
// and come out as they were.
func TestText(t *testing.T) {
	check := func(t interface{ Errorf(string, ...any) }, b string) {
		text := Text(b)
		if !utf8.ValidString(text) {
			t.Errorf("%q becomes %q, which is no text", b, text)
		}
		j, _ := json.Marshal(text)
		var back string
		if err := json.Unmarshal(j, &back); err != nil || Raw(back) != b {
			t.Errorf("%q comes back as %q", b, Raw(back))
		}
	}
	for _, b := range []string{"", "plain", "grün", "\xff", "a\xffb\xc3", "\xc3\x28", "\U0010ff80", "\U0010fffd\xf4\x8f", "\xed\xa0\x80", "\ufffd", string(rune(textBytes)), "\U0010feff", "\U0010f000"} {
		check(t, b)
		if utf8.ValidString(b) && b < "\U0010ff00" && Text(b) != b {
			t.Errorf("%q is changed to %q", b, Text(b))
		}
	}
	rapid.Check(t, func(t *rapid.T) { check(t, string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes"))) })
	rapid.Check(t, func(t *rapid.T) { check(t, rapid.String().Draw(t, "text")) })
}
