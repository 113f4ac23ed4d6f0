package proc
import ("testing";"time";"fmt")
func TestZZ(t *testing.T){
 f:=setup(t)
 var a,b,c time.Duration
 for range 20 { t0:=time.Now(); k:=f.create(f.task("sleep","1000")); t1:=time.Now(); f.Start(f.ctx(),k.ID); t2:=time.Now(); f.Remove(f.ctx(),k.ID); a+=t1.Sub(t0); b+=t2.Sub(t1); c+=time.Since(t2) }
 fmt.Println(a/20,b/20,c/20)
}
