package filled

import (
	"reflect"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

// TestWhole: nothing is left at its zero, wherever it is; what differs is named.
func TestWhole(t *testing.T) {
	v := Value[spec.Service]()
	var look func(x reflect.Value, at string)
	look = func(x reflect.Value, at string) {
		if x.IsZero() {
			t.Errorf("%s is zero", at)
			return
		}
		switch {
		case x.Kind() == reflect.Pointer:
			look(x.Elem(), at)
		case x.Kind() == reflect.Struct && x.Type().PkgPath() == reflect.TypeFor[spec.Service]().PkgPath():
			for i := range x.NumField() {
				look(x.Field(i), at+"."+x.Type().Field(i).Name)
			}
		case x.Kind() == reflect.Slice:
			for i := range x.Len() {
				look(x.Index(i), at)
			}
		}
	}
	look(reflect.ValueOf(v), "service")
	if d := Differ(v, Value[spec.Service]()); d != "" {
		t.Errorf("two are not alike: %s", d)
	}
	o := v.Clone()
	o.Spec.Task.Health.Retries = 0
	if d := Differ(v, o); d == "" || d[:27] != ".Spec.Task.Health.Retries: " {
		t.Errorf("%q", d)
	}
}
