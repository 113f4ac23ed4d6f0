// Package filled makes values with nothing left at its zero, for tests of what is
// stored or sent: a field that an encoding forgets comes back as zero, and the test
// that compares the two fails without knowing of the field.
package filled

import (
	"fmt"
	"net/netip"
	"reflect"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// Value returns a T, all of whose exported fields, at any depth, are not zero. Two
// calls return equal values; within one no two are alike where their type has room.
// A pointer to a type within itself is left nil.
func Value[T any]() T {
	var v T
	f := filler{on: map[reflect.Type]bool{}}
	f.fill(reflect.ValueOf(&v).Elem())
	return v
}

type filler struct {
	n  int64
	on map[reflect.Type]bool // structs that are being filled
}

func (f *filler) fill(v reflect.Value) {
	f.n++
	switch v.Type() {
	case reflect.TypeFor[netip.Addr]():
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{10, 0, byte(f.n >> 8), byte(f.n)})))
		return
	case reflect.TypeFor[netip.Prefix]():
		v.Set(reflect.ValueOf(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(f.n), 0, 0}), 24)))
		return
	case reflect.TypeFor[time.Time]():
		v.Set(reflect.ValueOf(time.Unix(f.n*3600, 0).UTC()))
		return
	case reflect.TypeFor[time.Duration]():
		v.SetInt(f.n * int64(time.Millisecond)) // the API's grain
		return
	case reflect.TypeFor[spec.TaskState]():
		v.SetInt(1 + f.n%int64(len(spec.TaskStates())-1))
		return
	case reflect.TypeFor[spec.EndpointState]():
		v.SetInt(1 + f.n%2)
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprintf("text%d", f.n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(1 + f.n%100)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(1 + f.n%200))
	case reflect.Float32, reflect.Float64:
		v.SetFloat(float64(f.n) + 0.5)
	case reflect.Slice:
		if f.on[v.Type().Elem()] {
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			f.fill(v.Index(i))
		}
	case reflect.Array:
		for i := range v.Len() {
			f.fill(v.Index(i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		f.fill(k)
		f.fill(e)
		v.SetMapIndex(k, e)
	case reflect.Pointer:
		if f.on[v.Type().Elem()] {
			return
		}
		v.Set(reflect.New(v.Type().Elem()))
		f.fill(v.Elem())
	case reflect.Struct:
		f.on[v.Type()] = true
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				f.fill(v.Field(i))
			}
		}
		delete(f.on, v.Type())
	}
}

// Differ names the first field in which two values differ, with both; "" when they
// are equal.
func Differ(a, b any) string { return differ(reflect.ValueOf(a), reflect.ValueOf(b), "") }

func differ(a, b reflect.Value, at string) string {
	if a.IsValid() && b.IsValid() && a.Type() == b.Type() && a.CanInterface() && reflect.DeepEqual(a.Interface(), b.Interface()) {
		return ""
	}
	if a.IsValid() && b.IsValid() && a.Type() == b.Type() {
		switch {
		case a.Kind() == reflect.Pointer && !a.IsNil() && !b.IsNil():
			return differ(a.Elem(), b.Elem(), at)
		case a.Kind() == reflect.Struct && a.NumField() > 0 && a.Type().Field(0).IsExported():
			for i := range a.NumField() {
				if a.Type().Field(i).IsExported() {
					if d := differ(a.Field(i), b.Field(i), at+"."+a.Type().Field(i).Name); d != "" {
						return d
					}
				}
			}
			return ""
		case a.Kind() == reflect.Slice && a.Len() == b.Len():
			for i := range a.Len() {
				if d := differ(a.Index(i), b.Index(i), fmt.Sprintf("%s[%d]", at, i)); d != "" {
					return d
				}
			}
		}
	}
	return fmt.Sprintf("%s: %v, was %v", at, b, a)
}
