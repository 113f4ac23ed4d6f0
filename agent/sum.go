package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
)

// sumForm is how a JSON object has its own checksum as its last member: the SHA-256, in
// hex, of the file as it would be without it. So what somebody else wrote, or one digit
// that a disk changed, is never believed, and versions of before read the object as they
// read their own.
type sumForm struct {
	member, end string // around the sum
	bare        string // where there is none
}

var (
	compactSum  = sumForm{`,"sum":"`, `"}`, `}`}                  // of json.Marshal
	indentedSum = sumForm{",\n  \"sum\": \"", "\"\n}\n", "\n}\n"} // of json.MarshalIndent, and a newline
)

// add puts the sum into an object that has members.
func (f sumForm) add(b []byte) []byte {
	sum := sha256.Sum256(b)
	return append(b[:len(b)-len(f.bare)], f.member+hex.EncodeToString(sum[:])+f.end...)
}

// check tells why a file is not what the sum that was read in it is of; nil: it is.
func (f sumForm) check(b []byte, sum string) error {
	body, ok := bytes.CutSuffix(b, []byte(f.member+sum+f.end))
	if !ok {
		return errors.New("damaged: its checksum is not at its end")
	}
	is := sha256.Sum256(append(slices.Clone(body), f.bare...))
	if hex.EncodeToString(is[:]) != sum {
		return errors.New("damaged: it is not what its checksum is of")
	}
	return nil
}
