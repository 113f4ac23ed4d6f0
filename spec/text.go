package spec

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Arguments, environment and labels are bytes where the kernel and Docker take
// bytes, but protobuf's strings, and JSON, are text. So inside of Shoal they are
// text from which the bytes come back: a byte that is no part of UTF-8 is the
// character textBytes+byte, of the last private use plane of Unicode. Bytes that
// happen to be one of these characters are taken apart in the same way, so that
// what Raw returns is always what Text was given.
const textBytes = 0x10FF00

// Text is bytes as text.
func Text(b string) string {
	if utf8.ValidString(b) && !strings.Contains(b, "\xf4\x8f\xbc") && !strings.Contains(b, "\xf4\x8f\xbd") && !strings.Contains(b, "\xf4\x8f\xbe") && !strings.Contains(b, "\xf4\x8f\xbf") {
		return b
	}
	var out strings.Builder
	for len(b) > 0 {
		r, n := utf8.DecodeRuneInString(b)
		if r == utf8.RuneError && n == 1 || r >= textBytes {
			for i := range n {
				out.WriteRune(textBytes + rune(b[i]))
			}
		} else {
			out.WriteString(b[:n])
		}
		b = b[n:]
	}
	return out.String()
}

// Raw are the bytes that Text was made from.
func Raw(t string) string {
	if !strings.Contains(t, "\xf4\x8f") {
		return t
	}
	var out strings.Builder
	for _, r := range t {
		if r >= textBytes && r < textBytes+256 {
			out.WriteByte(byte(r - textBytes))
		} else {
			out.WriteRune(r)
		}
	}
	return out.String()
}

// Texts and Raws are Text and Raw of each.
func Texts(in []string) []string { return mapped(in, Text) }

// Raws is the inverse of Texts.
func Raws(in []string) []string { return mapped(in, Raw) }

func mapped(in []string, fn func(string) string) []string {
	if in == nil {
		return nil
	}
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = fn(s)
	}
	return out
}

// Few joins names for a line of text: the first five, and how many more there are.
func Few(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
