package main

import (
	"strings"
	"testing"
)

// TestWhatDoesNotEndHasFailed: a run that was killed says so of none of its tests.
func TestWhatDoesNotEndHasFailed(t *testing.T) {
	const whole = `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":1}
{"Action":"run","Package":"p","Test":"TestB"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"run","Package":"p","Test":"TestC"}
{"Action":"pass","Package":"p","Test":"TestC"}
{"Action":"pass","Package":"p","Elapsed":1}
`
	if c := read(strings.NewReader(whole), "x"); c != (counts{Passed: 2, Skipped: 1}) {
		t.Errorf("%+v", c)
	}
	cut := strings.Join(strings.SplitAfter(whole, "\n")[:6], "")
	if c := read(strings.NewReader(cut), "x"); c != (counts{Passed: 1, Failed: 2, Skipped: 1}) { // TestC and the package
		t.Errorf("cut: %+v", c)
	}
}
